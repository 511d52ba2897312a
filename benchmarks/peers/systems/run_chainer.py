"""Chainer 7 on NumPy."""

from __future__ import annotations

import chainer
import numpy as np


def prepare(meta):  # type: ignore[no-untyped-def]
    chainer.config.dtype = np.dtype(np.float32)


def load(bundle):  # type: ignore[no-untyped-def]
    return Training(bundle) if bundle.training else Inference(bundle)


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        self.forward = bundle.module("chainer").forward
        self.p = [chainer.Variable(a) for a in bundle.params()]
        self.inputs = bundle.inputs()
        self.result = None

    def step(self) -> None:
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            self.result = self.forward(self.p, *self.inputs)

    def outputs(self):  # type: ignore[no-untyped-def]
        result = self.result if isinstance(self.result, tuple) else (self.result,)
        return [r.array for r in result]


class Training:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        self.forward = bundle.module("chainer").forward
        self.p = [chainer.Variable(a) for a in bundle.params()]
        self.inputs = bundle.inputs()
        self.link = chainer.Link()
        with self.link.init_scope():
            for i in bundle.trainable:
                self.p[i] = chainer.Parameter(self.p[i].array)
                setattr(self.link, f"p{i}", self.p[i])
        rate, momentum = bundle.meta["learning_rate"], bundle.meta["momentum"]
        self.optimiser = chainer.optimizers.MomentumSGD(rate, momentum).setup(self.link)
        self.last = None

    def step(self) -> None:
        self.link.cleargrads()
        self.last = self.forward(self.p, *self.inputs)
        self.last.backward()
        self.optimiser.update()

    def loss(self) -> float:
        return float(self.last.array)

    def trained(self):  # type: ignore[no-untyped-def]
        return [a.array for a in self.p]
