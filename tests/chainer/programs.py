"""Programs in plain Chainer style that could betray a lazy recorder.

Each takes the module `chainer` and returns arrays. `tools/record_chainer_programs.py` ran them with
Chainer itself; the tests run them with ours, lazily and op by op.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def network(chainer: Any) -> Any:
    """A small network with batch normalisation and dropout."""
    F, L = chainer.functions, chainer.links

    class Net(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                # No bias: behind batch normalisation its gradient is rounding, which Adam blows up.
                self.conv = L.Convolution2D(1, 3, 3, pad=1, nobias=True)
                self.bn = L.BatchNormalization(3)
                self.fc = L.Linear(None, 4)

        def forward(self, x: Any) -> Any:
            h = F.max_pooling_2d(F.relu(self.bn(self.conv(x))), 2)
            return self.fc(F.dropout(h, 0.3))

    return Net()


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.RandomState(5)
    return [
        (rng.randn(6, 1, 6, 6).astype(np.float32), rng.randint(0, 4, 6).astype(np.int32))
        for _ in range(count)
    ]


def setup(chainer: Any, name: str = "MomentumSGD", **options: Any) -> tuple[Any, Any]:
    np.random.seed(3)
    net = network(chainer)
    optimizer = getattr(chainer.optimizers, name)(**options)
    optimizer.setup(net)
    return net, optimizer


def state(net: Any) -> dict[str, np.ndarray]:
    found = {path[1:].replace("/", "."): np.array(p.array) for path, p in net.namedparams()}
    return {**found, "avg_mean": np.array(net.bn.avg_mean), "avg_var": np.array(net.bn.avg_var)}


def plain_loop(chainer: Any) -> dict[str, np.ndarray]:
    """forward, cleargrads, backward, update; the loss is read last."""
    net, optimizer = setup(chainer, lr=0.05)
    losses = []
    for x, t in batches(12):
        loss = chainer.functions.softmax_cross_entropy(net(x), t)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(float(loss.array))
    return {"losses": np.array(losses), **state(net)}


def loss_read_before_backward(chainer: Any) -> dict[str, np.ndarray]:
    net, optimizer = setup(chainer, "Adam", alpha=0.01)
    losses = []
    for x, t in batches(8):
        loss = chainer.functions.softmax_cross_entropy(net(x), t)
        losses.append(float(loss.array))
        net.cleargrads()
        loss.backward()
        optimizer.update()
    return {"losses": np.array(losses), **state(net)}


def branch_on_a_value(chainer: Any) -> dict[str, np.ndarray]:
    """Which loss is taken depends on a value of this iteration."""
    F = chainer.functions
    net, optimizer = setup(chainer, lr=0.05)
    taken = []
    for x, t in batches(8):
        y = net(x)
        confident = float(F.max(F.softmax(y)).array) > 0.5
        loss = F.softmax_cross_entropy(y, t) * (0.5 if confident else 1.0)
        taken.append(confident)
        net.cleargrads()
        loss.backward()
        optimizer.update()
    return {"taken": np.array(taken), **state(net)}


def reused_buffers(chainer: Any) -> dict[str, np.ndarray]:
    """One input buffer for all iterations, overwritten before any loss is asked for."""
    net, optimizer = setup(chainer, lr=0.05)
    buffer, labels = np.empty((6, 1, 6, 6), np.float32), np.empty(6, np.int32)
    total = []
    for x, t in batches(6):
        buffer[...] = x
        labels[...] = t
        loss = chainer.functions.softmax_cross_entropy(net(buffer), labels)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        buffer[...] = 0
        labels[...] = 0
        total.append(loss)
    return {"losses": np.array([float(v.array) for v in total]), **state(net)}


def edited_parameters(chainer: Any) -> dict[str, np.ndarray]:
    """Arrays that were handed out are edited by their holder between the steps."""
    net, optimizer = setup(chainer, lr=0.05)
    held = net.conv.W.array
    for k, (x, t) in enumerate(batches(6)):
        optimizer.update(lambda x, t: chainer.functions.softmax_cross_entropy(net(x), t), x, t)
        held *= 0.9
        net.fc.b.array[0] = k
    return state(net)


def several_losses_alive(chainer: Any) -> dict[str, np.ndarray]:
    """Two losses over one trunk, back-propagated one after the other, kept for later."""
    F = chainer.functions
    net, optimizer = setup(chainer, lr=0.02)
    kept = []
    for x, t in batches(6):
        y = net(x)
        first, second = F.softmax_cross_entropy(y, t), F.sum(F.square(y)) * 0.01
        net.cleargrads()
        first.backward()
        second.backward()
        optimizer.update()
        kept.append((first, second))
    values = np.array([[float(a.array), float(b.array)] for a, b in kept])
    return {"losses": values, **state(net)}


def statistics_nobody_asked_for(chainer: Any) -> dict[str, np.ndarray]:
    net, _ = setup(chainer)
    for x, _ in batches(4):
        with chainer.no_backprop_mode():
            net(x)
            net.bn(np.ones((2, 3, 4, 4), np.float32) * x[0, 0, 0, 0])
    return state(net)


def accumulated_gradients(chainer: Any) -> dict[str, np.ndarray]:
    """Gradients of three batches add up before one update."""
    net, optimizer = setup(chainer, lr=0.05)
    for k, (x, t) in enumerate(batches(9)):
        if k % 3 == 0:
            net.cleargrads()
        chainer.functions.softmax_cross_entropy(net(x), t).backward()
        if k % 3 == 2:
            optimizer.update()
    return {"gradient": np.array(net.fc.W.grad), **state(net)}


PROGRAMS = (
    plain_loop,
    loss_read_before_backward,
    branch_on_a_value,
    reused_buffers,
    edited_parameters,
    several_losses_alive,
    statistics_nobody_asked_for,
    accumulated_gradients,
)
