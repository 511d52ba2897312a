"""MXNet 1.9: a symbol bound to a static executor; its own momentum SGD on every array."""

from __future__ import annotations

import numpy as np

# MXNet 1.9 uses names of types that NumPy 1.24 took away; where they are, nothing changes.
if not hasattr(np, "bool"):
    np.bool = np.bool_

import mxnet as mx


def prepare(meta):  # type: ignore[no-untyped-def]
    """Threads are set by OMP_NUM_THREADS."""


def load(bundle):  # type: ignore[no-untyped-def]
    return Network(bundle)


class Network:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        arrays = [mx.nd.array(a, dtype=a.dtype) for a in bundle.params()]
        names = [f"p{i}" for i in range(len(arrays))]
        inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        variables = [mx.sym.Variable(n) for n in names]
        result = bundle.module("mxnet").forward(variables, *(mx.sym.Variable(n) for n in inputs))
        self.training = bundle.training
        result = mx.sym.MakeLoss(result) if self.training else _group(result)
        known = dict(zip(names, arrays))
        known.update({n: mx.nd.array(a, dtype=np.float32) for n, a in inputs.items()})
        self.arrays = arrays
        self.trainable = bundle.trainable
        trained = [names[i] for i in bundle.trainable] if self.training else []
        self.gradients = [mx.nd.zeros_like(known[n]) for n in trained]
        self.executor = result.bind(
            mx.cpu(),
            args={n: known[n] for n in result.list_arguments()},
            args_grad=dict(zip(trained, self.gradients)),
            grad_req={n: "write" if n in trained else "null" for n in result.list_arguments()},
            aux_states={n: known[n] for n in result.list_auxiliary_states()},
        )
        optimiser = mx.optimizer.SGD(
            learning_rate=bundle.meta["learning_rate"], momentum=bundle.meta["momentum"], wd=0.0
        )
        self.update = mx.optimizer.get_updater(optimiser)

    def step(self) -> None:
        self.executor.forward(is_train=self.training)
        if self.training:
            self.executor.backward()
            for k, (i, gradient) in enumerate(zip(self.trainable, self.gradients)):
                self.update(k, gradient, self.arrays[i])
        mx.nd.waitall()

    def outputs(self):  # type: ignore[no-untyped-def]
        return [a.asnumpy() for a in self.executor.outputs]

    def loss(self) -> float:
        return float(self.executor.outputs[0].asnumpy().reshape(-1)[0])

    def trained(self):  # type: ignore[no-untyped-def]
        return [a.asnumpy() for a in self.arrays]


def _group(result):  # type: ignore[no-untyped-def]
    return mx.sym.Group(list(result)) if isinstance(result, tuple) else result
