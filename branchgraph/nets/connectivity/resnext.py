"""ResNeXt (Xie et al., 1611.05431) after facebookresearch/ResNeXt, {depth, width, cardinality}.

    y = relu( S(x) + sum_{j<C} T_j(x) ),   T_j = 1x1 to d, 3x3 stride s, 1x1 to the stage's output

with batch norm after every convolution and ReLU after the first two; d is the width in the first
stage and doubles with every stage. S is the identity, or 1x1 and batch norm for another shape.
The C paths are declared as branches (form A) or as one grouped convolution (form C): with the same
weights the same function, batch statistics included, because one batch norm follows the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from branchgraph.ir.builder import max_pool, merge_sum
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.nets.connectivity.wiring import chosen, within
from branchgraph.nets.units import TORCH, residual

_NET = "resnext"
#: Modules a stage of the networks for ImageNet.
_IMAGENET = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: Layout to the channels of the stem and of the stages' outputs. `narrow` is what the parameter
#: counts of the papers' small networks imply.
_CHANNELS = {
    "narrow": (16, (64, 128, 256)),
    "wide": (64, (256, 512, 1024)),
    "imagenet": (64, (256, 512, 1024, 2048)),
}


@dataclass(frozen=True)
class Module:
    """The shape of one module: `inner` is d, the channels inside of a path."""

    number: int
    inner: int
    out: int
    stride: int

    def reshapes(self, x: Value) -> bool:
        """Whether the output of the module at `x` has another shape."""
        return x.shape[1] != self.out or self.stride != 1


@dataclass(frozen=True)
class Plan:
    """All that {depth, width, cardinality} and the layout say."""

    net: str
    layout: str
    modules: tuple[Module, ...]

    def stem(self, graph: Graph, size: int | None, channels: int, activate: bool = True) -> Value:
        """The input `x` and the first convolution; without `activate` that alone."""
        large = self.layout == "imagenet"
        size = within(self.net, "size", (224 if large else 32) if size is None else size, 4)
        x = graph.input("x", ("N", within(self.net, "channels", channels, 1), size, size))
        kernel, stride, width = (7, 2, 64) if large else (3, 1, _CHANNELS[self.layout][0])
        if activate:
            h = TORCH.unit(x, width, kernel, stride=stride, name="stem")
        else:
            h = TORCH.conv(x, width, kernel, stride=stride, name="stem")
        return max_pool(h, 3, stride=2, pad=1, name="pool") if large else h


def plan(net: str, depth: int, width: int, cardinality: int, layout: str) -> Plan:
    """The modules of a network; layout `auto` takes the one that the papers use."""
    chosen(net, "layout", layout, ("auto", *_CHANNELS))
    within(net, "width", width, 1)
    within(net, "cardinality", cardinality, 1)
    if layout == "auto":
        layout = "imagenet" if depth in _IMAGENET else "narrow" if width <= 8 else "wide"
    repeats = _repeats(net, depth, layout)
    outs = _CHANNELS[layout][1]
    shapes = [
        (width * 2**stage, out, 2 if stage and not module else 1)
        for stage, (out, count) in enumerate(zip(outs, repeats))
        for module in range(count)
    ]
    return Plan(net, layout, tuple(Module(i, *shape) for i, shape in enumerate(shapes, start=1)))


def _repeats(net: str, depth: int, layout: str) -> tuple[int, ...]:
    """Modules a stage."""
    if layout == "imagenet":
        if depth not in _IMAGENET:
            known = ", ".join(map(str, _IMAGENET))
            raise GraphError(f"{net}: depths for ImageNet are {known}, got {depth}")
        return _IMAGENET[depth]
    if depth < 11 or (depth - 2) % 9:
        raise GraphError(f"{net}: depth is 9 n + 2 for small images, got {depth}")
    return ((depth - 2) // 9,) * 3


def resnext(
    depth: int = 29, width: int = 8, cardinality: int = 8, classes: int = 10,
    form: str = "grouped", size: int | None = None, channels: int = 3, layout: str = "auto",
) -> Graph:  # fmt: skip
    """ResNeXt with its paths as `branches` or `grouped`; output `logits` [N, classes].

    Depth is 9 n + 2 for small images, with stages of 64, 128, 256 channels (`narrow`, widths up to
    8) or four times that (`wide`), or one of 50, 101, 152 (`imagenet`). {29,64,8} has 34 426 698
    parameters, {50,4,32} for 1000 classes 25 028 904.
    """
    forms = {"branches": _branches, "grouped": _grouped}
    paths = forms[chosen(_NET, "form", form, tuple(forms))]
    shapes = plan(_NET, depth, width, cardinality, layout)
    graph = Graph(_NET)
    h = shapes.stem(graph, size, channels)
    for module in shapes.modules:
        with scope(f"module{module.number}"):
            h = residual(paths(h, module, cardinality), _shortcut(h, module))
    graph.output("logits", TORCH.head(h, within(_NET, "classes", classes, 1)))
    return graph


def inside(x: Value, inner: int, stride: int, groups: int = 1) -> Value:
    """The first two convolutions of a path, or of `groups` paths at once."""
    h = TORCH.unit(x, inner, 1, name="reduce")
    return TORCH.unit(h, inner, 3, stride=stride, groups=groups, name="spatial")


def _grouped(x: Value, module: Module, cardinality: int) -> Value:
    h = inside(x, cardinality * module.inner, module.stride, cardinality)
    return TORCH.unit(h, module.out, 1, activate=False, name="expand")


def _branches(x: Value, module: Module, cardinality: int) -> Value:
    paths = []
    for j in range(cardinality):
        with branch(f"block{j}"):
            h = inside(x, module.inner, module.stride)
            paths.append(TORCH.conv(h, module.out, 1, name="expand"))
    with scope("expand"):
        return TORCH.norm(merge_sum(*paths, name="merge"))


def _shortcut(x: Value, module: Module) -> Value:
    if not module.reshapes(x):
        return x
    return TORCH.unit(x, module.out, 1, stride=module.stride, activate=False, name="shortcut")
