"""B-AlexNet and B-ResNet written a second time, in Chainer's functions, from the specification.

Each function takes the library (`chainer`, or what stands for it), arrays by the names of our
states, and images; it returns the value of every layer by our name of the node. Run by itself, the
module compares real Chainer with arrays written by the test:

    python branchynet_in_chainer.py ARRAYS.npz        (under a Python that has Chainer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Arrays = Mapping[str, Any]
Values = dict[str, Any]


class Layers:
    """Layers of BranchyNet over arrays; every result is kept by name."""

    def __init__(self, library: Any, arrays: Arrays) -> None:
        self.functions = library.functions
        self.arrays = arrays
        self.values: Values = {}

    def keep(self, name: str, value: Any) -> Any:
        self.values[name] = value.array
        return value

    def conv(self, x: Any, name: str, stride: int = 1, pad: int = 0) -> Any:
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        return self.keep(name, self.functions.convolution_2d(x, weight, bias, stride, pad))

    def fc(self, x: Any, name: str) -> Any:
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        return self.keep(name, self.functions.linear(x, weight, bias))

    def norm(self, x: Any, name: str) -> Any:
        parts = ("gamma", "beta", "running_mean", "running_var")
        arrays = (self.arrays[f"{name}.{part}"] for part in parts)
        return self.keep(name, self.functions.fixed_batch_normalization(x, *arrays, eps=2e-5))

    def relu(self, x: Any) -> Any:
        return self.functions.relu(x)

    def pool(self, x: Any) -> Any:
        return self.functions.max_pooling_2d(x, 3, stride=2)

    def lrn(self, x: Any) -> Any:
        return self.functions.local_response_normalization(x, n=3, k=2, alpha=5e-5, beta=0.75)


def b_alexnet(library: Any, arrays: Arrays, x: Any) -> Values:
    """Section 2.4; dropout is off."""
    net = Layers(library, arrays)
    h = net.lrn(net.pool(net.relu(net.conv(x, "conv1", pad=2))))
    second = net.conv(h, "conv2", pad=2)
    e = net.lrn(net.pool(net.relu(second)))
    e = net.relu(net.conv(e, "exit1/conv", pad=1))
    e = net.relu(net.conv(e, "exit1/conv_1", pad=1))
    net.fc(net.pool(e), "exit1/fc")
    h = net.lrn(net.pool(net.relu(second)))
    third = net.conv(h, "conv3", pad=1)
    e = net.lrn(net.pool(net.relu(third)))
    net.fc(net.pool(net.relu(net.conv(e, "exit2/conv", pad=1))), "exit2/fc")
    h = net.relu(third)
    h = net.relu(net.conv(h, "conv4", pad=1))
    h = net.pool(net.relu(net.conv(h, "conv5", pad=1)))
    h = net.relu(net.fc(h, "fc1"))
    net.fc(net.relu(net.fc(h, "fc2")), "fc")
    return net.values


def _block(net: Layers, x: Any, name: str, stride: int) -> Any:
    """Two 3x3 convolutions; a shortcut of zero channels in front and every second pixel."""
    h = net.conv(x, f"{name}/body/unit1/conv", stride=stride, pad=1)
    h = net.relu(net.norm(h, f"{name}/body/unit1/bn"))
    h = net.norm(net.conv(h, f"{name}/body/unit2/conv", pad=1), f"{name}/body/unit2/bn")
    if h.shape != x.shape:
        zeros = (x.array if hasattr(x, "array") else x)[:, :1] * 0
        missing = [zeros] * (h.shape[1] - x.shape[1])
        x = net.functions.average_pooling_2d(net.functions.concat([*missing, x], axis=1), 1, 2)
    return net.keep(f"{name}/relu", net.relu(h + x))


def b_resnet(library: Any, arrays: Arrays, x: Any) -> Values:
    """Section 2.5, the port with one block a stage."""
    net = Layers(library, arrays)
    h = net.relu(net.norm(net.conv(x, "stem/conv", pad=1), "stem/bn"))
    h = _block(net, h, "stage1/block1", 1)
    net.fc(_block(net, h, "exit1/block", 1), "exit1/fc")
    h = _block(net, h, "stage2/block1", 2)
    net.fc(net.relu(net.conv(h, "exit2/conv", pad=1)), "exit2/fc")
    h = _block(net, h, "stage3/block1", 2)
    net.fc(net.functions.average_pooling_2d(h, 6, stride=1), "fc")
    return net.values


NETWORKS: dict[str, Callable[[Any, Arrays, Any], Values]] = {
    "b_alexnet": b_alexnet,
    "b_resnet:blocks=1": b_resnet,
}


if __name__ == "__main__":
    import sys

    import chainer
    import numpy as np

    with np.load(sys.argv[1]) as stored:
        arrays = dict(stored)
    spec = str(arrays.pop("spec"))
    with chainer.using_config("train", False):
        found = NETWORKS[spec](chainer, arrays, chainer.Variable(arrays["x"]))
    for name, value in found.items():
        expected = arrays[f"value:{name}"]
        print(f"{name}: {np.abs(value - expected).max() / max(1.0, np.abs(expected).max()):.1e}")
