"""JAX: one jitted function, parameters and inputs on the device, arrays given up where replaced."""

from __future__ import annotations

import jax
import numpy as np


def prepare(meta):  # type: ignore[no-untyped-def]
    jax.config.update("jax_platforms", "cpu")


def load(bundle):  # type: ignore[no-untyped-def]
    return Training(bundle) if bundle.training else Inference(bundle)


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        forward = bundle.module("jax").forward
        self.forward = jax.jit(lambda p, *inputs: forward(p, {}, None, *inputs))
        self.p = [jax.device_put(a) for a in bundle.params()]
        self.inputs = [jax.device_put(a) for a in bundle.inputs()]
        self.result = None

    def step(self) -> None:
        self.result = jax.block_until_ready(self.forward(self.p, *self.inputs))

    def outputs(self):  # type: ignore[no-untyped-def]
        result = self.result if isinstance(self.result, tuple) else (self.result,)
        return [np.asarray(r) for r in result]


class Training:
    """Forward, backward, running statistics and momentum SGD in one program."""

    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        forward = bundle.module("jax").forward
        trainable = bundle.trainable
        rate, momentum = bundle.meta["learning_rate"], bundle.meta["momentum"]

        def loss_of(trained, p, key, inputs):  # type: ignore[no-untyped-def]
            p = list(p)
            for i, a in zip(trainable, trained):
                p[i] = a
            statistics = {}
            return forward(p, statistics, key, *inputs), statistics

        def step(p, v, key, *inputs):  # type: ignore[no-untyped-def]
            key, mine = jax.random.split(key)
            trained = [p[i] for i in trainable]
            gradient = jax.value_and_grad(loss_of, has_aux=True)
            (loss, statistics), found = gradient(trained, p, mine, inputs)
            v = [momentum * a - rate * g for a, g in zip(v, found)]
            p = [statistics.get(i, a) for i, a in enumerate(p)]
            for i, a, b in zip(trainable, trained, v):
                p[i] = a + b
            return loss, p, v, key

        self.run = jax.jit(step, donate_argnums=(0, 1, 2))
        self.p = [jax.device_put(a) for a in bundle.params()]
        self.v = [jax.numpy.zeros_like(self.p[i]) for i in trainable]
        self.key = jax.random.key(0)
        self.inputs = [jax.device_put(a) for a in bundle.inputs()]
        self.last = None

    def step(self) -> None:
        done = self.run(self.p, self.v, self.key, *self.inputs)
        self.last, self.p, self.v, self.key = jax.block_until_ready(done)

    def loss(self) -> float:
        return float(self.last)

    def trained(self):  # type: ignore[no-untyped-def]
        return [np.array(a) for a in self.p]
