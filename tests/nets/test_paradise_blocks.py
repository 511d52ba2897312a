"""ParaDise's blocks and perceptrons against recordings of the reference's own modules.

The bound is the recordings' own: 2e-6 max(1, max |y|) in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
import pytest
from goldens import golden

from branchgraph.compiler import compile
from branchgraph.ir.builder import log_softmax
from branchgraph.ir.errors import GraphError
from branchgraph.ir.functions import reduce_sum
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets.paradise import exchange_name, pd_perceptron
from branchgraph.nets.paradise_blocks import BRANCHES, ac, cbam, chosen, ge, pd_a, pd_b, se
from branchgraph.passes.specialise import specialise

Arrays = Mapping[str, np.ndarray]
Block = Callable[[Value], Value]


def exchange_names(graph: Graph) -> dict[State, str]:
    return {s: exchange_name(s) for s in graph.states}


@cache
def recorded(name: str) -> Arrays:
    with np.load(golden(f"paradise/{name}.npz")) as arrays:
        return dict(arrays)


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    bound = 2e-6 * max(1.0, float(np.abs(expected).max()))
    assert actual.shape == expected.shape, what
    assert np.abs(actual.astype(np.float64) - expected).max() <= bound, what


def declared(block: Block, x: np.ndarray) -> Graph:
    graph = Graph("block")
    graph.output("y", block(graph.input("x", ("N", *x.shape[1:]))))
    return graph


def keys(graph: Graph) -> dict:  # type: ignore[type-arg]
    """The reference's key of each state, without the name of the block itself."""
    return {s: key.partition(".")[2] for s, key in exchange_names(graph).items()}


def store_of(graph: Graph, arrays: Arrays, prefix: str = "") -> Store:
    return Store({s: arrays[prefix + key] for s, key in keys(graph).items()})


# -- disentangled blocks ---------------------------------------------------------------------------

#: File to its block.
PD_BLOCKS: dict[str, Block] = {
    "pd_a_c64_c64_s1": partial(pd_a, filters=64, name="block"),
    "pd_a_c64_c128_s2": partial(pd_a, filters=128, stride=2, name="block"),
    "pd_a_c128_c128_s1": partial(pd_a, filters=128, name="block"),
    "pd_b_c64_c64_s1": partial(pd_b, filters=64, name="block"),
    "pd_b_c64_c128_s2": partial(pd_b, filters=128, stride=2, name="block"),
}


@pytest.mark.parametrize("name", PD_BLOCKS)
def test_blocks_and_their_branches_agree_with_the_reference(name: str) -> None:
    arrays = recorded(name)
    graph = declared(PD_BLOCKS[name], arrays["input"])
    parts = {b: graph.find(f"block/{b}/{'sum' if b == 'skeleton' else 'bn'}") for b in BRANCHES}
    for branch, node in parts.items():
        graph.output(branch, node.output)
    store = store_of(graph, arrays)
    outputs = compile(graph, store=store)(x=arrays["input"])
    assert outputs["y"].dtype == np.float32
    assert_close(outputs["y"], arrays["output_f64"], name)
    for branch in BRANCHES:
        assert_close(outputs[branch], arrays[f"branch_out.{branch}"], branch)
    inputs = {"x": arrays["input"]}
    exact = interpret(specialise(graph, training=False), inputs, store, DType.F64).outputs["y"]
    np.testing.assert_allclose(exact, arrays["output_f64"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["pd_b_c64_c64_s1", "pd_b_c64_c128_s2"])
def test_the_gate_of_pd_b_weighs_the_branches_of_each_sample(name: str) -> None:
    arrays = recorded(name)
    graph = declared(PD_BLOCKS[name], arrays["input"])
    graph.output("gate", graph.find("block/gate/softmax").output)
    gate = compile(graph, store=store_of(graph, arrays))(x=arrays["input"])["gate"]
    assert_close(gate, arrays["gate"], "gate")
    assert np.ptp(gate, axis=0).min() > 0
    mixed = sum(
        gate[:, k, None, None, None] * arrays[f"branch_out.{b}"] for k, b in enumerate(BRANCHES)
    )
    assert_close(np.asarray(mixed), arrays["output"], "mixture")


def training_step(graph: Graph) -> Graph:
    """Loss sum(y dy), gradients of x and all parameters by the reference's keys, and updates."""
    names = keys(graph)
    training = specialise(graph, training=True)
    y = training.outputs["y"]
    dy = training.input("dy", y.shape)
    loss = training.output("loss", reduce_sum(y * dy))
    leaves = {"input": training.inputs["x"]}
    leaves |= {names[s]: training.read(s) for s in names if s.role is Role.PARAMETER}
    gradients = vjp(training, {loss: None}, leaves.values())
    for key, leaf in leaves.items():
        training.output(f"grad.{key}", gradients[leaf])
    return training


def check_step(outputs: Arrays, after: Arrays, step: Arrays) -> None:
    assert_close(outputs["y"], step["output_train"], "output")
    loss = np.sum(step["output_train"].astype(np.float64) * step["grad_output"])
    assert_close(outputs["loss"], loss, "loss")
    for key, expected in step.items():
        kind, _, name = key.partition(".")
        if kind == "grad":
            assert_close(outputs[key], expected, key)
        elif kind == "grad_sum":
            assert_close(outputs[f"grad.{name}"].sum(axis=(2, 3)), expected, key)
        elif kind == "after":
            assert_close(after[name], expected, key)


@pytest.mark.parametrize("kind", ["pd_a", "pd_b"])
def test_a_training_step_agrees_with_the_reference(kind: str) -> None:
    start, step = recorded(f"{kind}_c64_c64_s1"), recorded(f"{kind}_train_step")
    graph = declared(PD_BLOCKS[f"{kind}_c64_c64_s1"], step["input"])
    store, training = store_of(graph, start), training_step(graph)
    inputs = {"x": step["input"], "dy": step["grad_output"]}
    exact = interpret(training, inputs, store, DType.F64)
    names = keys(graph)
    check_step(exact.outputs, {names[s]: v for s, v in exact.updates.items()}, step)
    outputs = compile(training, store=store).run(inputs)
    check_step(outputs, {names[s]: store[s] for s in names}, step)
    unrecorded = {f"grad.{names[s]}" for s in names if s.role is Role.PARAMETER} - set(step)
    assert {k.replace("grad.", "grad_sum.") for k in unrecorded} <= set(step)


# -- blocks it is compared with --------------------------------------------------------------------

#: Case to its block, whose name says where the reference's keys begin.
BASELINES: dict[str, Block] = {
    "se_r16": se,
    "cbam_r16": cbam,
    "cbam_r16_nospatial": partial(cbam, spatial=False),
    "ge_theta_e2_in14": partial(ge, extent=2),
    "ge_theta_e4_in14": partial(ge, extent=4),
    "ge_theta_e8_in14": ge,
    "ge_theta_e8_in7": ge,
    "ge_theta_global_in7": partial(ge, extent=0),
    "ge_thetaplus_e4_in14": partial(ge, extent=4, mlp=True),
    "ge_minus_e2_in14": partial(ge, extent=2, parameters=False),
    "ge_minus_global_in7": partial(ge, extent=0, parameters=False),
    "ac_s1": partial(ac, filters=24),
    "ac_s2": partial(ac, filters=24, stride=2),
    "ac_k5_pad2": partial(ac, filters=8, kernel=5, pad=2),
    "ac_k3_pad2": partial(ac, filters=8, kernel=3, pad=2),
}


@pytest.mark.parametrize("case", BASELINES)
def test_gates_and_asymmetric_blocks_agree_with_the_reference(case: str) -> None:
    arrays = {k[len(case) + 1 :]: v for k, v in recorded("baseline_blocks").items()
              if k.startswith(case + ".")}  # fmt: skip
    graph = declared(BASELINES[case], arrays["input"])
    store = store_of(graph, arrays)
    assert len(store) == len(arrays) - 2
    y = compile(graph, store=store)(x=arrays["input"])["y"]
    assert_close(y, arrays["output"], case)
    inputs = {"x": arrays["input"]}
    exact = interpret(specialise(graph, training=False), inputs, store, DType.F64).outputs["y"]
    assert_close(exact, arrays["output"], case)


# -- perceptrons -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "prefix"), [("pd_a", "pda."), ("pd_b", "pdb.")])
def test_perceptrons_agree_with_the_reference(form: str, prefix: str) -> None:
    arrays = recorded("mnist_pd")
    graph = pd_perceptron(form)
    graph.output("y", log_softmax(graph.outputs["logits"]))
    store = Store({s: arrays[prefix + key] for s, key in exchange_names(graph).items()})
    inputs = {"x": arrays[f"{prefix}input"]}
    assert_close(compile(graph, store=store).run(inputs)["y"], arrays[f"{prefix}output_f64"], form)
    exact = interpret(graph, inputs, store, DType.F64).outputs["y"]
    np.testing.assert_allclose(exact, arrays[f"{prefix}output_f64"], rtol=1e-12, atol=1e-12)


# -- arguments -------------------------------------------------------------------------------------


def test_branches_are_taken_in_the_order_of_the_gate() -> None:
    assert chosen(("group", "standard1")) == ("standard1", "group")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (partial(pd_a, filters=64, branches=("standard3",)), "standard1, standard2, skeleton, gro"),
        (partial(pd_a, filters=64, branches=("group", "group")), "distinct ones"),
        (partial(pd_b, filters=64, branches=()), "got none"),
        (partial(pd_a, filters=96), "64 channels and 96 filters in 64 groups"),
        (partial(pd_b, filters=64, reduction=65), "64 channels reduced 65 times leave none"),
        (partial(se, reduction=0), "64 channels reduced 0 times"),
        (partial(cbam, pools=("median",)), "average, maximum"),
        (partial(ge, extent=3), r"extent is 0 \(global\), 2, 4 or 8, got 3"),
        (partial(ac, filters=8, kernel=5, pad=1), "use pad >= 2"),
    ],
)
def test_arguments_that_make_no_block_are_refused(block: Block, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        declared(block, np.zeros((1, 64, 8, 8)))


def test_a_gate_over_positions_needs_sizes() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 32, "H", "W"))
    with pytest.raises(GraphError, match="known sizes"):
        ge(x)
