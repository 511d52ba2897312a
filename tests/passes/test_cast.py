"""Mixed precision: what runs in which type, masters in float32, training that goes on working."""

from __future__ import annotations

import numpy as np
import pytest
from builders import image_input, images, random_graphs, randomised
from hypothesis import given, settings
from test_every_network import LARGE, NETS

from branchgraph.compiler import compile
from branchgraph.data import load
from branchgraph.ir.builder import (
    batch_norm,
    conv,
    cross_entropy,
    dense,
    dropout,
    flatten,
    global_average_pool,
    max_pool,
    merge_sum,
    relu,
    softmax,
)
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node, scope
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.nets import NETWORKS, network
from branchgraph.nets.reparameterised import dbb, repvgg_unit
from branchgraph.passes.base import Pass
from branchgraph.passes.cast import PRODUCTS, MixedPrecision, SkipOverflow
from branchgraph.passes.checking import random_feeds
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, joint_loss, train

DIGITS = "lenet:size=8,kernel=3,widths=8+16+32"
HALF = MixedPrecision(dtype=DType.F16)
#: Largest step of a rounding to bfloat16 (8 bits) and float16 (11 bits).
STEP = {DType.BF16: 2.0**-8, DType.F16: 2.0**-11}


def small() -> Graph:
    graph = Graph("small")
    x = graph.input("x", ("N", 1, 2, 2))
    h = relu(batch_norm(conv(x, 2, 1, bias=False, name="conv"), name="bn"))
    graph.output("y", softmax(dense(h, 3, name="fc")))
    return graph


def types(graph: Graph) -> dict[str, set[DType]]:
    """Opcode to the types of its results."""
    found: dict[str, set[DType]] = {}
    for node in graph.nodes:
        found.setdefault(node.op.opcode, set()).update(v.dtype for v in node.outputs)
    return found


AFTER = """\
graph small {
  state conv.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state bn.gamma : f32[2] param init=ones()
  state bn.beta : f32[2] param init=zeros()
  state bn.running_mean : f32[2] statistic init=zeros()
  state bn.running_var : f32[2] statistic init=ones()
  state fc.weight : f32[3, 8] param init=lecun_normal(fan_in=8, scale=1.0)
  state fc.bias : f32[3] param init=zeros()
  input x : f32[N, 1, 2, 2]
  %0 = cast(x) {dtype=bf16} : bf16[N, 1, 2, 2]
  %1 = cast(conv.weight) {dtype=bf16} : bf16[2, 1, 1, 1]
  %2 = conv(%0, %1) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : bf16[N, 2, 2, 2]  # conv
  %3 = cast(%2) {dtype=f32} : f32[N, 2, 2, 2]
  %4 = batch_norm(%3, bn.gamma, bn.beta, bn.running_mean, bn.running_var) {eps=2e-05, decay=0.9, unbiased=true} : f32[N, 2, 2, 2]  # bn
  %5 = cast(%4) {dtype=bf16} : bf16[N, 2, 2, 2]
  %6 = relu(%5) : bf16[N, 2, 2, 2]
  %7 = reshape(%6) {shape=[N, 8]} : bf16[N, 8]
  %8 = cast(fc.weight) {dtype=bf16} : bf16[3, 8]
  %9 = cast(fc.bias) {dtype=bf16} : bf16[3]
  %10 = dense(%7, %8, %9) : bf16[N, 3]  # fc
  %11 = cast(%10) {dtype=f32} : f32[N, 3]
  %12 = softmax(%11) {axis=1} : f32[N, 3]
  output y = %12
}
"""  # noqa: E501


def test_the_rewrite_as_text() -> None:
    graph = small()
    text = format_graph(graph)
    result = MixedPrecision().run(graph)
    assert format_graph(result.graph) == AFTER
    assert format_graph(graph) == text, "the argument is not changed"
    assert result.report.matches == ["conv", "relu", "reshape", "fc"]


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_with_a_mode_is_cast_too(training: bool) -> None:
    graph = specialise(small(), training=training)
    after = MixedPrecision().apply(graph)
    verify(after)
    found = types(after)
    name = "batch_norm_training" if training else "batch_norm_inference"
    assert found[name] == found["softmax"] == {DType.F32}
    assert found["conv"] == found["dense"] == found["relu"] == {DType.BF16}
    assert after.updates.keys() == graph.updates.keys()


def test_losses_and_reductions_are_float32_and_gradients_come_back_to_masters() -> None:
    graph = Graph("g")
    h = relu(conv(image_input(graph), 4, 3, name="conv"))
    labels = graph.input("labels", ("N",), DType.I64)
    graph.output("loss", cross_entropy(dense(global_average_pool(h), 5, name="fc"), labels))
    after = MixedPrecision().apply(graph)
    found = types(after)
    assert found["reduce_mean"] == found["cross_entropy"] == {DType.F32}
    assert all(s.dtype is DType.F32 for s in after.states)
    backward = differentiate(after)
    assert {s.name for s in backward.gradients} == {
        "conv.weight", "conv.bias", "fc.weight", "fc.bias"
    }  # fmt: skip
    assert all(v.dtype is DType.F32 for v in backward.gradients.values())
    assert types(backward)["conv_weight_gradient"] == {DType.BF16}


def test_parameter_expressions_stay_float32() -> None:
    graph = Graph("g")
    x = image_input(graph)
    weight = graph.read(State("w", (4, 3, 1, 1)))
    graph.output("y", conv(x, 4, 1, weight=weight * 0.5 + weight, bias=False))
    after = MixedPrecision().apply(graph)
    assert types(after)["multiply"] == types(after)["add"] == {DType.F32}


def test_what_follows_nothing_low_is_left_alone() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    graph.output("y", relu(x) + x)
    assert not MixedPrecision().run(graph).report.matches


def test_other_types_are_left_alone() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4), DType.F64)
    graph.output("y", relu(dense(x, 3)))
    assert not MixedPrecision().run(graph).report.matches


def test_scopes_may_be_kept() -> None:
    graph = Graph("g")
    x = image_input(graph)
    with scope("head"):
        kept = relu(conv(x, 4, 3, name="conv"))
    with scope("header"):
        low = relu(conv(kept, 4, 3, name="conv"))
    graph.output("y", merge_sum(low, conv(kept, 4, 3, name="last")))
    result = MixedPrecision(keep=("head", "last", "nowhere")).run(graph)
    assert result.report.matches == ["header/conv", "header", "sum"]
    assert [where for where, _ in result.report.refusals] == ["head/conv", "last"]
    assert "'nowhere'" in result.report.notes[0]
    assert result.graph.find("head/conv").output.dtype is DType.F32
    assert result.graph.find("header/conv").output.dtype is DType.BF16


def test_options_are_checked() -> None:
    assert Pass.from_spec("cast:dtype=f16,keep=head+fc,loss_scale=1024") == MixedPrecision(
        dtype=DType.F16, keep=("head", "fc"), loss_scale=1024.0
    )
    with pytest.raises(GraphError, match="f16 or bf16, got f64"):
        Pass.from_spec("cast:dtype=f64")
    with pytest.raises(FormatError, match="expected DType"):
        Pass.from_spec("cast:dtype=float8")
    with pytest.raises(GraphError, match="at least 1"):
        MixedPrecision(loss_scale=0.0)


def test_a_graph_that_is_differentiated_is_refused() -> None:
    graph = differentiate(joint_loss(specialise(network(DIGITS), training=True)))
    with pytest.raises(GraphError, match="cast before differentiate"):
        MixedPrecision().run(graph)


@pytest.mark.parametrize("dtype", STEP)
@settings(max_examples=15, deadline=None)
@given(random_graphs())
def test_random_networks_run_and_stay_near(dtype: DType, graph: Graph) -> None:
    """In float64 the casts do nothing, so the network is the same function but for rounding."""
    step = MixedPrecision(dtype=dtype)
    result = step.run(graph)
    assert not step.run(result.graph).report.matches, "a second application matches nothing"
    before, after = (specialise(g, training=False) for g in (graph, result.graph))
    store = randomised(graph)
    fed = {"x": images()}
    expected = interpret(before, fed, store, DType.F64).outputs["logits"]
    exact = interpret(after, fed, store, DType.F64).outputs["logits"]
    np.testing.assert_array_equal(exact, expected)


@pytest.mark.parametrize("dtype", STEP)
def test_the_result_is_as_near_as_the_type_allows(dtype: DType) -> None:
    """Three layers, each rounding operands and result: a few steps, relative to the largest."""
    graph = network(DIGITS)
    store = Store.initialised(graph.states)
    fed = {"x": images(8, channels=1, size=8)}
    expected = interpret(graph, fed, store).outputs["logits"]
    found = interpret(MixedPrecision(dtype=dtype).apply(graph), fed, store).outputs["logits"]
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert STEP[dtype] / 16 < error < 16 * STEP[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_cast(name: str) -> None:
    graph = NETWORKS.network(name)
    result = MixedPrecision().run(graph)
    products = [n for n in result.graph.nodes if n.op.opcode in ("conv", "dense")]
    fixed = [n for n in products if n.output.dtype is DType.F32]
    assert products
    assert len(result.report.matches) >= len(products) - len(fixed) > 0
    assert not fixed, "no network keeps a product in float32"
    assert all(v.dtype is DType.F32 for v in result.graph.outputs.values())
    assert {s.name for s in result.graph.states} == {s.name for s in graph.states}
    assert not MixedPrecision().run(result.graph).report.matches


# -- after fusion ----------------------------------------------------------------------------------

#: Half the smallest positive number: what a rounding may lose where numbers are tiny.
TINY = {DType.BF16: 2.0**-134, DType.F16: 2.0**-25}
#: Rounding of float32, in which NumPy accumulates products of the low types.
SINGLE = 2.0**-24
#: A convolution at every position.
GEOMETRY = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
#: The share of the bound that is reached at least: a bound that nothing comes near says nothing.
REACHED = 1 / 500


def growth(count: int, step: float) -> float:
    """`count` roundings one after another: (1 + step)^count - 1 <= n u / (1 - n u)."""
    return count * step / (1 - count * step)


class Bounds:
    """Bounds on |computed in the low type - exact| for every value of a network in float32.

    With u and t the step and the tiniest error of the type, low(a) = a (1 + d) + s, |d| <= u and
    |s| <= t. Let x be known to within e. Of a product over n terms, accumulated in float32 (g_n =
    `growth` of n float32 steps) and rounded, then added to a rounded bias and rounded again,

        r_x = e + u (|x| + e) + t       r_w = u |w| + t         r_b = u |b| + t
        r_y = (|w| r_x + r_w (|x| + r_x))                       both operands are not what they were
            + g_n s + u (1 + g_n) s + t                         s = (|w| + r_w) (|x| + r_x)
            + r_b + u (s' + |b| + r_b) + t                      s' = (1 + g_n) (1 + u) s + t

    where a product of a weight and a bound is the layer itself, without bias. ReLU and maxima hand
    bounds on, since they move no two numbers apart; so does flattening. A mean of m is computed in
    float32: the mean of e + g_m (|x| + e).
    """

    def __init__(self, graph: Graph, store: Store, fed: np.ndarray, dtype: DType) -> None:
        self.step, self.tiny = STEP[dtype], TINY[dtype]
        self.values = {v: np.asarray(store[s], np.float64) for s, v in graph.reads.items()}
        self.values[graph.inputs["x"]] = fed.astype(np.float64)
        self.errors = {v: np.zeros_like(a) for v, a in self.values.items()}
        for node in graph.nodes:
            (self.values[node.output],) = node.op.evaluate(*(self.values[v] for v in node.inputs))
            self.errors[node.output] = self.of(node)

    def rounded(self, value: np.ndarray, error: np.ndarray | float = 0.0) -> np.ndarray:
        """The bound of a value after rounding, from the one before."""
        return error + self.step * (np.abs(value) + error) + self.tiny

    def of(self, node: Node) -> np.ndarray:
        x, error = self.values[node.inputs[0]], self.errors[node.inputs[0]]
        if node.op.opcode in ("conv", "dense"):
            return self.product(node, x, error)
        if node.op.opcode == "reduce_mean":
            count = x.size // self.values[node.output].size
            (mean,) = node.op.evaluate(error + growth(count, SINGLE) * (np.abs(x) + error))
            return np.asarray(mean)
        assert node.op.opcode in ("relu", "max_pool", "reshape"), node
        (handed,) = node.op.bind({"N": len(x)}).evaluate(error)
        return np.asarray(handed)

    def product(self, node: Node, x: np.ndarray, error: np.ndarray) -> np.ndarray:
        w, b = (self.values[v] for v in node.inputs[1:])
        b = b.reshape(-1, *(1,) * (x.ndim - 2))
        r_x, r_w, r_b = self.rounded(x, error), self.rounded(w), self.rounded(b)
        (moved,) = node.op.evaluate(r_x, np.abs(w))
        (weighed,) = node.op.evaluate(np.abs(x) + r_x, r_w)
        (s,) = node.op.evaluate(np.abs(x) + r_x, np.abs(w) + r_w)
        g = growth(w[0].size, SINGLE)
        after = self.rounded((1 + g) * s, g * s) - self.step * g * s
        both = (1 + g) * (1 + self.step) * s + self.tiny + np.abs(b) + r_b
        return np.asarray(moved + weighed + after + r_b + self.step * both + self.tiny)


def branchy() -> Graph:
    """Two blocks of three branches each, a pooling between them, and a head."""
    graph = Graph("branchy")
    h = relu(repvgg_unit(graph.input("x", ("N", 3, 8, 8)), 8))
    h = relu(dbb(max_pool(h, 2), 8))
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def test_products_of_low_types_are_accumulated_in_float32() -> None:
    """4096 ones: bfloat16 would stop at 256, float16 at 2048."""
    for dtype in STEP:
        ones = np.ones((1, 4096), dtype.numpy)
        for op, x in (("dense", ones), ("conv", ones.reshape(1, 4096, 1, 1))):
            geometry = {} if op == "dense" else GEOMETRY
            made = make(op, **geometry)
            (found,) = made.evaluate(x, ones.reshape(1, 4096, *(1,) * (x.ndim - 2)))
            assert found.dtype == dtype.numpy
            assert float(found.reshape(())) == 4096


@pytest.mark.parametrize("early", [False, True], ids=["expressions", "materialised"])
@pytest.mark.parametrize("dtype", STEP)
def test_a_fused_network_that_is_cast_stays_within_its_roundings(dtype: DType, early: bool) -> None:
    graph = specialise(branchy(), training=False)
    store = randomised(graph, 3)
    fused = FuseBranches().apply(graph)
    plain, origin = materialise(fused)
    evaluate_origin(origin, store)
    products = [n for n in plain.nodes if n.op.opcode in ("conv", "dense")]
    assert [n.op.opcode for n in products] == ["conv", "conv", "dense"]
    result = MixedPrecision(dtype=dtype).run(plain if early else fused)
    assert {n.output.dtype for n in map(result.graph.find, paths(products))} == {dtype}
    assert all(s.dtype is DType.F32 for s in result.graph.states)
    fed = images(4, size=8)
    found = interpret(result.graph, {"x": fed}, store).outputs["logits"]
    bounds = Bounds(plain, store, fed, dtype)
    bound = bounds.errors[plain.outputs["logits"]]
    error = np.abs(found.astype(np.float64) - bounds.values[plain.outputs["logits"]])
    assert (error <= bound).all()
    assert error.max() >= REACHED * bound.max()


def paths(nodes: list[Node]) -> list[str]:
    return [n.path for n in nodes]


# -- every network ---------------------------------------------------------------------------------

#: Networks whose activations, untrained, overflow float32 already: there is nothing to compare.
INFINITE = {"cross_imagenet", "resnet_imagenet"}
#: Networks whose activations, untrained, are beyond 65504, the largest number of float16.
BEYOND_HALF = {"inception_v3"}


def assert_inference_is_near(name: str, dtype: DType) -> None:
    """Logits are those of float32 within 2 sqrt(n) u of their norm, for n products.

    A product rounds what it reads and what it makes: 2 u relative to its values. Roundings point
    anywhere, so those of n products add up as a random walk does, where norms keep values in scale.
    """
    graph = specialise(network(NETS[name]), training=False, exits="all")
    store = Store.initialised(graph.states, 0)
    after = MixedPrecision(dtype=dtype).apply(graph)
    assert set(after.states) == set(graph.states)
    assert all(s.dtype is DType.F32 for s in after.states if s.role is Role.PARAMETER)
    fed = random_feeds(graph)
    expected, found = (interpret(g, fed, store).outputs for g in (graph, after))
    products = sum(n.op.opcode in PRODUCTS for n in graph.nodes)
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        error = np.linalg.norm(found[key].astype(np.float64) - value) / np.linalg.norm(value)
        assert error <= 2 * np.sqrt(products) * STEP[dtype], key


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("name", sorted(NETS.keys() - LARGE))
def test_inference_after_a_cast_is_near(name: str, dtype: DType) -> None:
    assert_inference_is_near(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("name", sorted(LARGE - INFINITE - BEYOND_HALF))
def test_inference_of_large_networks_after_a_cast_is_near(name: str, dtype: DType) -> None:
    assert_inference_is_near(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BEYOND_HALF))
def test_bfloat16_holds_what_float16_cannot(name: str) -> None:
    assert_inference_is_near(name, DType.BF16)
    graph = specialise(network(NETS[name]), training=False)
    with np.errstate(all="ignore"):
        run = interpret(HALF.apply(graph), random_feeds(graph), Store.initialised(graph.states, 0))
    assert not np.isfinite(run.outputs["logits"]).all()


# -- training --------------------------------------------------------------------------------------


def losses(graph: Graph) -> list[float]:
    data = load("digits").subset(train=384)
    training = Training.of(graph, Adam(learning_rate=5e-3), seed=0)
    history = train(training, data.train_images, data.train_labels, epochs=4, batch=32)
    assert all(training.store[s].dtype == np.float32 for s in graph.states)
    return history.series("loss")


@pytest.fixture(scope="module")
def in_float32() -> list[float]:
    return losses(network(DIGITS))


@pytest.mark.parametrize(
    "step",
    [MixedPrecision(), MixedPrecision(dtype=DType.F16, loss_scale=1024.0)],
    ids=["bf16", "f16 scaled"],
)
def test_training_on_digits_falls_like_float32(
    step: MixedPrecision, in_float32: list[float]
) -> None:
    """Within 3 % of the first loss at every epoch, and far down at the end."""
    expected, found = in_float32, losses(step.apply(network(DIGITS)))
    assert max(abs(a - b) for a, b in zip(expected, found)) < 0.03 * expected[0]
    assert found[-1] < 0.3 * found[0]


def tiny(scale: MixedPrecision) -> tuple[Graph, State]:
    """A loss whose gradient inside the low region is below what float16 can hold."""
    graph = Graph("tiny")
    y = dense(graph.input("x", ("N", 2)), 1, bias=False, name="fc")
    graph.output("loss", y.graph.emit(make("reduce_sum", axes=(0, 1)), y) * 1e-9)
    after = differentiate(scale.apply(graph))
    (state,) = after.gradients
    return after, state


def test_loss_scaling_keeps_small_gradients() -> None:
    fed = {"x": np.ones((1, 2), np.float32)}
    for scale, expected in ((1.0, 0.0), (2.0**15, 1e-9)):
        graph, state = tiny(MixedPrecision(dtype=DType.F16, loss_scale=scale))
        run = interpret(graph, fed, Store.initialised(graph.states))
        np.testing.assert_allclose(run.gradients[state], expected, rtol=1e-3)


def test_scaling_changes_no_value_and_no_gradient() -> None:
    """In float64 nothing underflows: the scale goes in and comes out again."""
    graph = joint_loss(specialise(network(DIGITS), training=True))
    runs = []
    for scale in (1.0, 256.0):
        backward = differentiate(MixedPrecision(loss_scale=scale).apply(graph))
        fed = {"x": images(4, channels=1, size=8), "labels": np.arange(4)}
        runs.append(interpret(backward, fed, Store.initialised(graph.states), DType.F64))
    assert runs[0].outputs["loss"] == runs[1].outputs["loss"]
    for state, value in runs[0].gradients.items():
        np.testing.assert_allclose(runs[1].gradients[state], value, rtol=1e-12)


# -- dynamic loss scaling --------------------------------------------------------------------------


def step_graph(scale: float, clean: int = 1000) -> Graph:
    """A training step of f16 with a dynamic loss scale."""
    graph = Graph("net")
    h = batch_norm(dense(dropout(graph.input("x", ("N", 4)), 0.1), 4, name="fc"), name="bn")
    graph.output("logits", dense(relu(h), 3, name="last"))
    low = MixedPrecision(dtype=DType.F16, loss_scale=scale, dynamic=True).apply(graph)
    backward = differentiate(joint_loss(specialise(low, training=True)))
    return SkipOverflow(clean=clean).apply(MomentumSGD(learning_rate=0.1).attach(backward))


def run_steps(graph: Graph, count: int, scale: float) -> tuple[list[float], Store, Store]:
    """Scales after each step, the first store and the last."""
    store = Store.initialised(graph.states)
    first = store.copy()
    step = compile(graph, store=store)
    rng = np.random.default_rng(0)
    (state,) = (s for s in graph.states if s.role is Role.LOSS_SCALE)
    seen = []
    for _ in range(count):
        x = rng.normal(size=(8, 4)).astype(np.float32) * scale
        with np.errstate(all="ignore"):
            step.run({"x": x, "labels": rng.integers(0, 3, 8)})
        seen.append(float(store[state]))
    return seen, first, store


def test_the_scale_doubles_after_clean_steps() -> None:
    seen, _, _ = run_steps(step_graph(64.0, clean=3), 7, 1.0)
    assert seen == [64, 64, 128, 128, 128, 256, 256]


def test_an_overflow_halves_the_scale_and_leaves_the_step_out() -> None:
    graph = step_graph(2.0**30)
    seen, first, last = run_steps(graph, 2, 1.0)
    assert seen == [2.0**29, 2.0**28]
    for state in graph.states:
        same = np.array_equal(first[state], last[state])
        held = state.role in (Role.PARAMETER, Role.SLOT)
        if held:
            assert same, state
        elif state.role is Role.STATISTIC or state.name == "random.step":
            assert not same, state
    assert all(np.isfinite(last[s]).all() for s in graph.states if s.dtype.is_float)


def test_the_scale_comes_down_until_steps_are_clean_and_not_below_one() -> None:
    graph = step_graph(2.0**24)
    seen, first, last = run_steps(graph, 20, 1.0)
    assert seen[-1] == seen[-2] > 1
    moved = [s for s in graph.states if s.role is Role.PARAMETER]
    assert any(not np.array_equal(first[s], last[s]) for s in moved)


def test_inputs_that_are_infinite_never_reach_parameters() -> None:
    graph = step_graph(4.0)
    seen, first, last = run_steps(graph, 4, np.inf)
    assert seen == [2, 1, 1, 1]
    for state in graph.states:
        if state.role in (Role.PARAMETER, Role.SLOT) and "clean" not in state.name:
            np.testing.assert_array_equal(last[state], first[state])


def test_without_a_dynamic_scale_there_is_nothing_to_skip() -> None:
    graph = joint_loss(specialise(HALF.apply(network(DIGITS)), training=True))
    with pytest.raises(GraphError, match="attach an optimiser"):
        SkipOverflow().run(graph)
    attached = SGD().attach(differentiate(graph))
    report = SkipOverflow().run(attached).report
    assert not report.matches
    assert "cast with dynamic=true" in report.refusals[0][1]
    again = SkipOverflow().run(step_graph(64.0)).report
    assert not again.matches


def test_a_flattened_input_follows_its_layer() -> None:
    graph = Graph("g")
    graph.output("y", dense(flatten(image_input(graph)), 3))
    after = MixedPrecision().apply(graph)
    assert types(after)["reshape"] == {DType.F32}, "it reads a float32 input"
    assert types(after)["dense"] == {DType.BF16}
