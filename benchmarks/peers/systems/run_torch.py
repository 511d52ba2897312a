"""PyTorch eager, and the same function through `torch.compile`."""

from __future__ import annotations

import torch


def prepare(meta):  # type: ignore[no-untyped-def]
    torch.set_num_threads(meta["threads"])


def load(bundle, compiled=False):  # type: ignore[no-untyped-def]
    kind = Training if bundle.training else Inference
    return kind(bundle, compiled)


class Inference:
    """Under `inference_mode`; inputs are tensors made once."""

    def __init__(self, bundle, compiled):  # type: ignore[no-untyped-def]
        forward = bundle.module("torch").forward
        self.forward = torch.compile(forward) if compiled else forward
        self.p = [torch.from_numpy(a) for a in bundle.params()]
        self.inputs = [torch.from_numpy(a) for a in bundle.inputs()]
        self.result = None

    def step(self) -> None:
        with torch.inference_mode():
            self.result = self.forward(self.p, *self.inputs)

    def outputs(self):  # type: ignore[no-untyped-def]
        result = self.result if isinstance(self.result, tuple) else (self.result,)
        return [r.numpy() for r in result]


class Training:
    """Autograd and `torch.optim.SGD`; gradients set to None between steps."""

    def __init__(self, bundle, compiled):  # type: ignore[no-untyped-def]
        forward = bundle.module("torch").forward
        self.forward = torch.compile(forward) if compiled else forward
        self.p = [torch.from_numpy(a) for a in bundle.params()]
        self.inputs = [torch.from_numpy(a) for a in bundle.inputs()]
        trained = [self.p[i].requires_grad_() for i in bundle.trainable]
        rate, momentum = bundle.meta["learning_rate"], bundle.meta["momentum"]
        self.optimiser = torch.optim.SGD(trained, lr=rate, momentum=momentum)
        self.last = None

    def step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.last = self.forward(self.p, *self.inputs)
        self.last.backward()
        self.optimiser.step()

    def loss(self) -> float:
        return float(self.last)

    def trained(self):  # type: ignore[no-untyped-def]
        return [a.detach().numpy() for a in self.p]
