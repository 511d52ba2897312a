"""Optimizers and hooks: the life of an update, what is recorded, what compiles."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
from branchgraph.chainer import optimizer, optimizer_hooks, optimizers
from branchgraph.chainer.link import Link
from branchgraph.chainer.recorder import recorder
from branchgraph.chainer.serializers import DictionarySerializer, NpzDeserializer
from branchgraph.chainer.variable import Parameter, Variable

OPTIMIZERS = [
    optimizers.SGD, optimizers.MomentumSGD, optimizers.CorrectedMomentumSGD, optimizers.NesterovAG,
    optimizers.Adam, optimizers.AdamW, optimizers.AMSGrad, optimizers.AdaBound,
    optimizers.AMSBound, optimizers.RMSprop, optimizers.RMSpropGraves, optimizers.AdaGrad,
    optimizers.AdaDelta, optimizers.SMORMS3,
]  # fmt: skip
HOOKS = [
    optimizer_hooks.WeightDecay(0.1), optimizer_hooks.Lasso(0.1),
    optimizer_hooks.GradientClipping(0.1), optimizer_hooks.GradientHardClipping(-0.1, 0.2),
    optimizer_hooks.GradientLARS(), optimizer_hooks.GradientNoise(0.1),
]  # fmt: skip


class Line(Link):
    """W x + b; `aside` is a parameter that takes no part."""

    def __init__(self, dtype: Any = np.float32) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        with self.init_scope():
            self.W = Parameter(rng.normal(size=(2, 3)).astype(dtype))
            self.b = Parameter(np.ones(2, dtype))
            self.aside = Parameter(np.full(2, 2.0, dtype))

    def loss(self, x: np.ndarray) -> Variable:
        y = F.linear(x, self.W, self.b)
        return F.sum(y * y)


X = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def gradients(model: Line) -> dict[str, np.ndarray]:
    """The gradient of the loss by hand."""
    dy = 2 * (X @ model.W.array.T + model.b.array)
    return {"W": dy.T @ X, "b": dy.sum(axis=0)}


def test_an_update_takes_the_loss_clears_goes_back_and_moves() -> None:
    model = Line()
    opt = optimizers.SGD(lr=0.1).setup(model)
    model.W.grad = np.full((2, 3), 1e6, np.float32)
    before, expected = model.W.array.copy(), gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.W.array, before - 0.1 * expected["W"], rtol=1e-5)
    assert opt.t == model.W.update_rule.t == 1


def test_the_manual_loop_gives_the_same() -> None:
    by_hand, by_loss = Line(), Line()
    first, second = optimizers.Adam().setup(by_hand), optimizers.Adam().setup(by_loss)
    for _ in range(3):
        loss = by_hand.loss(X)
        by_hand.cleargrads()
        loss.backward()
        first.update()
        second.update(by_loss.loss, X)
    np.testing.assert_array_equal(by_hand.W.array, by_loss.W.array)


def test_a_parameter_without_a_gradient_gets_zeros_and_is_decayed_and_moved() -> None:
    model = Line()
    opt = optimizers.MomentumSGD(lr=0.1, momentum=0.5).setup(model)
    opt.add_hook(optimizer_hooks.WeightDecay(0.5))
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.aside.array, 2 - 0.1 * 1.0)
    np.testing.assert_allclose(model.aside.grad, 1.0)
    opt.remove_hook("WeightDecay")
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.aside.array, 1.9 - 0.05, rtol=1e-6)


def test_uninitialised_parameters_are_passed_over() -> None:
    model = Line()
    with model.init_scope():
        model.lazy = Parameter(0.0)
    opt = optimizers.Adam().setup(model)
    for hook in HOOKS:
        opt.add_hook(hook)
    opt.update(model.loss, X)
    assert not model.lazy.is_initialized
    assert model.lazy.update_rule.state is None


def test_a_disabled_rule_freezes_its_parameter() -> None:
    model = Line()
    opt = optimizers.Adam().setup(model)
    model.W.update_rule.enabled = False
    before = model.W.array.copy(), model.b.array.copy()
    opt.update(model.loss, X)
    np.testing.assert_array_equal(model.W.array, before[0])
    assert (model.b.array != before[1]).all()
    assert (model.W.update_rule.t, model.b.update_rule.t, opt.t) == (0, 1, 1)


def test_an_override_holds_for_one_parameter_and_the_rest_follow_the_optimizer() -> None:
    model = Line()
    opt = optimizers.SGD(lr=0.1).setup(model)
    model.W.update_rule.hyperparam.lr = 0.0
    opt.lr = 0.5
    assert model.b.update_rule.hyperparam.lr == opt.hyperparam.lr == 0.5
    W, b, expected = model.W.array.copy(), model.b.array.copy(), gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_array_equal(model.W.array, W)
    np.testing.assert_allclose(model.b.array, b - 0.5 * expected["b"], rtol=1e-5)
    assert model.W.update_rule.hyperparam.get_dict() == {"lr": 0.0}


# -- hooks -----------------------------------------------------------------------------------------


def test_hooks_run_in_the_order_they_were_added_around_the_update() -> None:
    model, seen = Line(), []
    opt = optimizers.SGD().setup(model)

    def each(name: str) -> Any:
        def hook(rule: Any, param: Parameter) -> None:
            seen.append((name, param.name, rule.t))

        hook.call_for_each_param = True  # type: ignore[attr-defined]
        return hook

    opt.add_hook(lambda o: seen.append(("after", o.t)), "after", timing="post")
    opt.add_hook(each("each"), "each")
    opt.add_hook(lambda o: seen.append(("before", o.t)), "before")
    model.b.update_rule.add_hook(lambda rule, p: seen.append(("own", p.name, rule.t)), "own")
    opt.update(model.loss, X)
    names = [p.name for p in model.params()]
    assert seen == [
        *(("each", n, 0) for n in names), ("before", 0), ("own", "b", 1), ("after", 1),
    ]  # fmt: skip


def test_hooks_have_names_and_need_setup() -> None:
    opt, hook = optimizers.SGD(), optimizer_hooks.WeightDecay(0.1)
    with pytest.raises(RuntimeError, match="setup"):
        opt.add_hook(hook)
    opt.setup(Line())
    opt.add_hook(hook)
    with pytest.raises(KeyError, match="WeightDecay"):
        opt.add_hook(hook, timing="post")
    opt.add_hook(hook, name="again")
    opt.remove_hook("WeightDecay")
    with pytest.raises(KeyError):
        opt.remove_hook("WeightDecay")
    with pytest.raises(TypeError):
        opt.add_hook(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timing"):
        opt.add_hook(hook, "other", timing="late")


def test_a_hook_may_edit_arrays_in_place() -> None:
    model = Line()
    opt = optimizers.SGD(lr=1.0).setup(model)

    def halve(o: Any) -> None:
        for p in o.target.params():
            g = p.grad
            g *= 0.5

    opt.add_hook(halve)
    before, expected = model.b.array.copy(), gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.b.array, before - 0.5 * expected["b"], rtol=1e-5)


def test_clipping_uses_the_norm_over_all_parameters() -> None:
    model = Line()
    opt = optimizers.SGD().setup(model)
    opt.add_hook(optimizer_hooks.GradientClipping(0.25))
    opt.update(model.loss, X)
    assert sum(float((p.grad**2).sum()) for p in model.params()) == pytest.approx(0.25**2)
    opt.remove_hook("GradientClipping")
    opt.add_hook(optimizer_hooks.GradientClipping(1e9))
    expected = gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.W.grad, expected["W"], rtol=1e-5)


def test_noise_is_drawn_from_numpy_in_the_order_of_the_parameters() -> None:
    model = Line()
    opt = optimizers.SGD().setup(model)
    opt.add_hook(optimizer_hooks.GradientNoise(0.3))
    for step in range(2):
        for p in model.params():
            p.grad = np.zeros_like(p.array)
        np.random.seed(step)
        opt.update()
        np.random.seed(step)
        std = np.sqrt(0.3 / (1 + step) ** 0.55)
        for p in model.params():
            drawn = np.random.normal(0, std, p.shape).astype(np.float32)
            np.testing.assert_array_equal(p.grad, drawn)


def test_old_names_of_hooks_warn() -> None:
    with pytest.warns(DeprecationWarning, match="optimizer_hooks"):
        assert optimizer.WeightDecay is optimizer_hooks.WeightDecay
    with pytest.raises(AttributeError):
        optimizer.Nothing  # noqa: B018


# -- what is compiled ------------------------------------------------------------------------------


def compilations(opt: Any, model: Line, steps: int, vary: Any = lambda i: None) -> int:
    """Programs compiled in so many updates."""
    before = recorder().compilations
    for i in range(steps):
        vary(i)
        opt.update(model.loss, X)
    return recorder().compilations - before


def test_a_hundred_updates_of_adam_compile_at_most_twice() -> None:
    model = Line()
    opt = optimizers.Adam().setup(model)
    for hook in HOOKS:
        opt.add_hook(hook)
    assert compilations(opt, model, 100) <= 2


def test_schedules_compile_nothing() -> None:
    model = Line()
    opt = optimizers.MomentumSGD(lr=0.01, momentum=0.5).setup(model)
    decay = optimizer_hooks.WeightDecay(0.1)
    opt.add_hook(decay)
    compilations(opt, model, 2)

    def vary(i: int) -> None:
        opt.lr = 0.1 / (i + 1)
        opt.momentum = opt.lr if i % 2 else 0.9
        decay.rate = 0.01 * i

    assert compilations(opt, model, 6, vary) == 0


def test_an_update_leaves_nothing_pending() -> None:
    model = Line()
    optimizers.Adam().setup(model).update(model.loss, X)
    assert not recorder().pending
    assert not recorder().updated


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_lazy_and_immediate_updates_agree(cls: Any) -> None:
    results = []
    for lazy in (True, False):
        model = Line()
        opt = cls().setup(model)
        for hook in HOOKS:
            opt.add_hook(hook)
        np.random.seed(0)
        with chainer.using_config("lazy", lazy):
            for _ in range(3):
                opt.update(model.loss, X)
        results.append([p.array for p in model.params()])
        assert opt.t == 3
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# -- states, counts and dtypes ---------------------------------------------------------------------


def test_states_are_arrays_that_may_be_set() -> None:
    model = Line()
    opt = optimizers.MomentumSGD(lr=1.0, momentum=0.5).setup(model)
    rule = model.b.update_rule
    assert rule.state is None
    opt.update(model.loss, X)
    np.testing.assert_allclose(rule.state["v"], -model.b.grad)
    rule.state["v"] = np.zeros(2, np.float32)
    before, expected = model.b.array.copy(), gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.b.array, before - expected["b"], rtol=1e-5)


def test_float16_parameters_stay_float16_and_adam_computes_in_float32() -> None:
    model = Line(np.float16)
    opt = optimizers.Adam().setup(model)
    for p in model.params():
        p.grad = np.full_like(p.array, 0.01)
    opt.update()
    assert model.b.dtype == model.b.update_rule.state["m"].dtype == np.float16
    np.testing.assert_allclose(model.b.array, 1 - 0.001, rtol=1e-3)
    opt.eps = 1e-60
    with pytest.raises(ValueError, match="eps"):
        opt.update()


def test_alpha_t_needs_a_step_and_lr_of_adam_is_its_old_name() -> None:
    model = Line()
    opt = optimizers.Adam(alpha=0.1).setup(model)
    with pytest.raises(RuntimeError, match="first update"):
        _ = opt.alpha_t
    opt.update(model.loss, X)
    assert opt.alpha_t == pytest.approx(0.1 * np.sqrt(1 - 0.999) / (1 - 0.9))
    with pytest.warns(DeprecationWarning, match="alpha_t"):
        assert opt.lr == opt.alpha_t


def test_epochs_are_counted_by_one_side_only() -> None:
    opt = optimizers.SGD().setup(Line())
    opt.new_epoch()
    opt.use_auto_new_epoch = True
    with pytest.raises(RuntimeError, match="updater"):
        opt.new_epoch()
    opt.new_epoch(auto=True)
    assert opt.epoch == 2
    assert opt.setup(Line()).epoch == 0
    with pytest.raises(TypeError):
        opt.setup(3)


def test_rules_written_for_chainer_run() -> None:
    class Rule(optimizer.UpdateRule):
        def init_state(self, param: Parameter) -> None:
            assert self.state is not None
            self.state["n"] = np.zeros_like(param.array)

        def update_core_cpu(self, param: Parameter) -> None:
            assert self.state is not None
            n = self.state["n"]
            n += 1
            data = param.data
            data -= self.hyperparam.lr * param.grad

    class Mine(optimizer.GradientMethod):
        lr = optimizer.HyperparameterProxy("lr")

        def create_update_rule(self) -> Rule:
            return Rule(self.hyperparam)

    model = Line()
    opt = Mine(lr=0.1).setup(model)
    before, expected = model.b.array.copy(), gradients(model)
    opt.update(model.loss, X)
    np.testing.assert_allclose(model.b.array, before - 0.1 * expected["b"], rtol=1e-5)
    assert (model.b.update_rule.state["n"] == 1).all()


def test_training_goes_on_from_what_was_written() -> None:
    model = Line()
    opt = optimizers.Adam().setup(model)
    written = DictionarySerializer()
    opt.serialize(written)
    assert set(written.target) == {"t", "epoch", "W/t", "b/t", "aside/t"}
    opt.update(model.loss, X)
    written = DictionarySerializer()
    opt.serialize(written)
    assert {k for k in written.target if k.startswith("W/")} == {"W/t", "W/m", "W/v"}
    saved = {k: np.array(v) for k, v in written.target.items()}

    other = Line()
    other.copyparams(model)
    second = optimizers.Adam().setup(other)
    second.serialize(NpzDeserializer(saved))
    for o, m in ((opt, model), (second, other)):
        o.update(m.loss, X)
    np.testing.assert_array_equal(model.W.array, other.W.array)
    assert (second.t, other.W.update_rule.t) == (2, 2)


def test_a_file_from_before_the_first_update_can_be_read() -> None:
    written = DictionarySerializer()
    optimizers.Adam().setup(Line()).serialize(written)
    opt = optimizers.Adam().setup(Line())
    opt.serialize(NpzDeserializer({k: np.array(v) for k, v in written.target.items()}))
    opt.update(opt.target.loss, X)


def test_a_copied_rule_has_its_own_states() -> None:
    model = Line()
    optimizers.Adam().setup(model).update(model.loss, X)
    copied = copy.deepcopy(model.b.update_rule)
    copied.state["m"][...] = 7
    assert (model.b.update_rule.state["m"] != 7).all()
