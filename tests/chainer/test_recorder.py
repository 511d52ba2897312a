"""The lazy recorder: one program an iteration, and the numbers of running op by op."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
from branchgraph.chainer.recorder import recorder
from branchgraph.chainer.variable import Parameter, Variable
from branchgraph.ir.ops.conv import Conv

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 6, 1, 4, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, size=(100, 6)).astype(np.int32)


class Net:
    """conv, relu, dense by hand."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.conv = Parameter(rng.normal(size=(4, 1, 3, 3)).astype(np.float32) * 0.3)
        self.fc = Parameter(rng.normal(size=(3, 64)).astype(np.float32) * 0.1)
        for p in (self.conv, self.fc):
            p.cleargrad()

    def loss(self, x: np.ndarray, t: np.ndarray) -> Variable:
        h = F.relu(F.convolution_2d(x, self.conv, pad=1))
        return F.softmax_cross_entropy(F.linear(h, self.fc), t)

    def step(self, loss: Variable, rate: float = 0.1) -> None:
        for p in (self.conv, self.fc):
            p.cleargrad()
        loss.backward()
        for p in (self.conv, self.fc):
            assert p._grad is not None
            assert p._holder is not None
            moved = Variable._of(p._operand()) - Variable._of(p._grad) * rate
            recorder().assign(p._holder, moved._operand())
        recorder().flush()


def train(steps: int, read_first: bool = False) -> list[float]:
    net = Net()
    losses = []
    for i in range(steps):
        loss = net.loss(X[i], LABELS[i])
        if read_first:
            losses.append(float(loss.array))  # type: ignore[arg-type]
        net.step(loss)
        if not read_first:
            losses.append(float(loss.array))  # type: ignore[arg-type]
    return losses


@pytest.fixture
def eager() -> list[float]:
    with chainer.using_config("lazy", False):
        return train(20)


def compilations(steps: int, **how: bool) -> int:
    before = recorder().compilations
    train(steps, **how)
    return recorder().compilations - before


def test_a_hundred_iterations_compile_once_or_twice() -> None:
    assert compilations(100) <= 2
    assert compilations(100, read_first=True) <= 2


@pytest.mark.parametrize("read_first", [False, True])
def test_lazy_gives_the_numbers_of_running_op_by_op(eager: list[float], read_first: bool) -> None:
    np.testing.assert_allclose(train(20, read_first), eager, rtol=1e-5)


def test_reading_the_loss_before_backward_runs_forward_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards: list[int] = []
    original = Conv.evaluate
    monkeypatch.setattr(Conv, "evaluate", lambda s, *a: forwards.append(1) or original(s, *a))
    train(5, read_first=True)
    assert len(forwards) == 5


def test_a_buffer_that_is_reused_was_copied() -> None:
    buffer = X[0].copy()
    y = F.relu(buffer)
    buffer[...] = 0
    np.testing.assert_array_equal(y.array, np.maximum(X[0], 0))
    held = Variable(X[0].copy())
    z = F.relu(held)
    held.array[...] = 0
    np.testing.assert_array_equal(z.array, np.maximum(X[0], 0))


def test_an_array_that_was_handed_out_is_seen_and_updated_in_place() -> None:
    net = Net()
    held = net.fc.array
    held[...] = 0.0
    loss = net.loss(X[0], LABELS[0])
    assert float(loss.array) == pytest.approx(np.log(3), rel=1e-6)
    net.step(loss)
    assert held.any()


def test_several_losses_alive_accumulate_over_the_shared_trunk() -> None:
    x = Variable(X[0])
    h = F.relu(x)
    first, second = (
        F.linear(h, np.ones((1, 16), np.float32)),
        F.linear(h, np.ones((1, 16), np.float32)),
    )
    for y in (first, second):
        y.grad = np.ones(y.shape, np.float32)
        y.backward()
    np.testing.assert_array_equal(x.grad, 2.0 * (X[0] > 0))


def test_backward_twice_doubles_the_gradients_of_leaves() -> None:
    x = Variable(np.array([1.0, -2.0, 3.0], np.float32))
    y = F.relu(x) * 2.0
    for _ in range(2):
        y.grad = np.ones(3, np.float32)
        y.backward()
    assert x.grad.tolist() == [4.0, 0.0, 4.0]


def test_a_gradient_does_not_keep_the_backward_pass_that_made_it() -> None:
    net = Net()
    loss = net.loss(X[0], LABELS[0])
    for p in (net.conv, net.fc):
        p.cleargrad()
    loss.backward()
    assert net.conv._grad is not None
    made_from = [weakref.ref(t) for t in net.conv._grad.call.inputs if t.call is not None]
    assert made_from
    recorder().flush()
    assert net.conv._grad.call is None
    kept = [t for t in (r() for r in made_from) if t is not None and not t.requires_grad]
    assert not kept
    assert np.abs(net.conv.grad).max() > 0


def test_only_leaves_keep_gradients_unless_asked() -> None:
    x = Variable(np.ones(1, np.float32))
    h = F.relu(x)
    (h * 3.0).backward()
    assert h.grad is None
    assert x.grad.tolist() == [3.0]
    y = h * 3.0
    y.backward(retain_grad=True)
    assert h.grad.tolist() == [3.0]


def test_a_number_that_varies_does_not_compile_again() -> None:
    x = np.ones(1009, np.float32)  # a size that no other test compiles for
    before = recorder().compilations
    for k in range(10):
        assert (F.relu(x) * float(k)).array.tolist() == [float(k)] * x.size
    assert recorder().compilations - before == 1


def test_no_history_outside_back_propagation() -> None:
    x = Variable(np.ones(3, np.float32))
    with chainer.no_backprop_mode():
        y = F.relu(x)
    assert y.creator is None
    y.grad = np.ones(3, np.float32)
    y.backward()
    assert x.grad is None


def test_programs_never_asked_for_do_not_grow_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("branchgraph.chainer.recorder.MOST_PENDING", 50)
    recorder().flush()
    y = Variable(np.ones(3, np.float32))
    for _ in range(500):
        y = F.relu(y)
        assert len(recorder().pending) < 50
