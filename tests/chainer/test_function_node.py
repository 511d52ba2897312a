"""User-defined functions of both styles."""

from __future__ import annotations

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
from branchgraph.chainer import Function, FunctionNode, Variable, type_check
from branchgraph.chainer.recorder import recorder


class Square(FunctionNode):
    """x^2, new style."""

    def check_type_forward(self, in_types):  # type: ignore[no-untyped-def]
        type_check.expect(in_types.size() == 1, in_types[0].dtype.kind == "f")

    def forward(self, inputs):  # type: ignore[no-untyped-def]
        self.retain_inputs((0,))
        return (inputs[0] ** 2,)

    def backward(self, indexes, grad_outputs):  # type: ignore[no-untyped-def]
        (x,) = self.get_retained_inputs()
        return (2.0 * x * grad_outputs[0],)


class SumAndProduct(Function):
    """x + y and x y, old style."""

    def forward_cpu(self, inputs):  # type: ignore[no-untyped-def]
        x, y = inputs
        return x + y, x * y

    def backward_cpu(self, inputs, grad_outputs):  # type: ignore[no-untyped-def]
        x, y = inputs
        ones = np.zeros_like(x)
        gs, gp = (g if g is not None else ones for g in grad_outputs)
        return gs + gp * y, gs + gp * x


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_new_style_function_stands_between_recorded_ones(lazy: bool) -> None:
    with chainer.using_config("lazy", lazy):
        x = Variable(array(1, -2, 3))
        (y,) = Square().apply((F.relu(x) * 3.0,))
        loss = F.sum(y)
        loss.backward()
        assert y.array.tolist() == [9.0, 0.0, 81.0]
        assert x.grad.tolist() == [18.0, 0.0, 54.0]


def test_an_old_style_function_has_several_outputs() -> None:
    x, y = Variable(array(2, 3)), Variable(array(5, 7))
    total, product = SumAndProduct()(x, y)
    F.sum(total + product * 2.0).backward()
    assert x.grad.tolist() == [11.0, 15.0]
    assert y.grad.tolist() == [5.0, 7.0]


def test_an_output_nobody_uses_counts_as_zero() -> None:
    x, y = Variable(array(2, 3)), Variable(array(5, 7))
    _, product = SumAndProduct()(x, y)
    F.sum(product).backward()
    assert x.grad.tolist() == [5.0, 7.0]


def test_what_is_pending_runs_before_a_users_function_and_compiles_once() -> None:
    def iteration() -> None:
        x = Variable(array(1, -2, 3))
        (y,) = Square().apply((F.relu(x),))
        F.sum(F.relu(y)).backward()
        assert x.grad.tolist() == [2.0, 0.0, 6.0]

    iteration()
    before = recorder().compilations
    for _ in range(5):
        iteration()
    assert recorder().compilations == before


def test_outside_back_propagation_there_is_no_history() -> None:
    with chainer.no_backprop_mode():
        (y,) = Square().apply((Variable(array(2)),))
    assert y.creator is None


def test_types_are_checked_and_results_must_be_tuples() -> None:
    with pytest.raises(type_check.InvalidType):
        Square().apply((np.array([1, 2]),))

    class Wrong(FunctionNode):
        def forward(self, inputs):  # type: ignore[no-untyped-def]
            return inputs[0]

    with pytest.raises(TypeError, match="must return a tuple"):
        Wrong().apply((array(1),))
