"""The sheet of networks: one picture each, and the page that shows them.

    python tools/draw_networks.py            # docs/networks.md and docs/images/networks/*.png
    python tools/draw_networks.py cross pd_b # these pictures only, the page for all

Every network stands in a representative form that is small enough to read. A block that would
drown in its network has a picture of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from branchgraph import network
from branchgraph.ir.cost import cost
from branchgraph.ir.graph import Graph, Value
from branchgraph.nets.paradise_blocks import cbam, ge, pd_a, pd_b, se
from branchgraph.nets.reparameterised import acnet, dbb, repvgg_unit
from branchgraph.show import counts, render
from branchgraph.show.style import (
    BRANCH_FILL,
    BRANCH_LINE,
    LOOKS,
    REPEAT_LINE,
    SCOPE_FILL,
    SCOPE_LINE,
)

#: Resolution of the pictures: readable on a page, and the folder stays small.
DPI = 80
DOCS = Path(__file__).resolve().parents[1] / "docs"

#: Makes a block from its input.
Block = Callable[[Value], Value]


@dataclass(frozen=True)
class Entry:
    """A picture: the network of a `spec`, or a `block` that `spec` writes down; what to look at."""

    name: str
    spec: str
    look: str
    block: Block | None = None

    def graph(self) -> Graph:
        """The network, or a graph of the block alone, on 64 channels of 28x28."""
        if self.block is None:
            return network(self.spec)
        graph = Graph(self.name)
        graph.output("y", self.block(graph.input("x", ("N", 64, 28, 28))))
        return graph


@dataclass(frozen=True)
class Family:
    """Pictures under one heading."""

    title: str
    entries: tuple[Entry, ...]


SHEET = (
    Family(
        "BranchyNet (Teerapittayanon et al., arXiv 1709.01686)",
        (
            Entry(
                "b_lenet",
                "b_lenet",
                "One early exit hangs on the first convolution; the last exit takes the rest.",
            ),
            Entry(
                "b_alexnet",
                "b_alexnet",
                "Two early exits leave from convolutions 2 and 3, before their ReLU.",
            ),
            Entry(
                "b_resnet",
                "b_resnet",
                "Stages of residual blocks, drawn once each; exits behind stages 1 and 2.",
            ),
            Entry(
                "b_resnet_original",
                "b_resnet:blocks=18,form=original",
                "ResNet-110 with the exits of 2016: behind the stem and behind stage 1.",
            ),
            Entry("lenet", "lenet", "The trunk of B-LeNet."),
            Entry("alexnet", "alexnet", "The trunk of B-AlexNet."),
            Entry(
                "resnet_a",
                "resnet_a",
                "The trunk of B-ResNet; shortcuts that widen add zero channels in front.",
            ),
        ),
    ),
    Family(
        "Deep Fusion (Zhao et al., arXiv 1611.07718)",
        (
            Entry(
                "cross",
                "cross:depth=26",
                "Merge-and-run (DFN-MR): two streams, each block adds the mean of both to each; "
                "the last one joins them.",
            ),
            Entry(
                "half",
                "half:depth=38",
                "Inception-like (DFN-IL): a shortcut and two branches meet in one sum.",
            ),
            Entry("side", "side:depth=38", "Two branches and no shortcut."),
            Entry("resnet", "resnet:depth=20", "A shortcut and one branch: ResNet."),
            Entry("plain", "plain:depth=20", "One branch: a chain of convolutions."),
            Entry(
                "fuse3",
                "fuse3:depth=14",
                "Three blocks of one deep and one shallow branch.",
            ),
            Entry("fuse6", "fuse6:depth=14", "The same depth in six blocks."),
            Entry(
                "ensemble",
                "ensemble:depth=5",
                "The eight paths of a three-block fusion as networks that share their weights.",
            ),
            Entry(
                "cross_imagenet",
                "cross_imagenet",
                "Merge-and-run of bottlenecks; a stage's first block merges nothing, and the "
                "streams meet in a concatenation.",
            ),
            Entry(
                "resnet_imagenet",
                "resnet_imagenet",
                "ResNet of bottlenecks; a stage's first block has no shortcut.",
            ),
        ),
    ),
    Family(
        "ParaDise (Ma et al., doi 10.26599/BDMA.2024.9020087)",
        (
            Entry(
                "pd_a",
                "pd_a(x, 64)",
                "PD-A: two standard 3x3 convolutions, the skeleton of 3x1 and 1x3, and a grouped "
                "one in one sum.",
                lambda x: pd_a(x, 64),
            ),
            Entry(
                "pd_b",
                "pd_b(x, 64)",
                "PD-B: the same branches, each behind a gate; softmax weights come from the pooled "
                "input.",
                lambda x: pd_b(x, 64),
            ),
            Entry(
                "pd_a_resnet",
                "pd_a_resnet18",
                "PD-A in place of every 3x3 convolution of the residual blocks.",
            ),
            Entry("pd_perceptron", "pd_perceptron:form=pd_b", "Two gated dense layers a layer."),
            Entry("imagenet_resnet", "imagenet_resnet50", "The ResNet that all of them change."),
        ),
    ),
    Family(
        "Attention, for comparison",
        (
            Entry(
                "se",
                "se(x)",
                "Squeeze and excitation: a gate a channel from the pooled input.",
                lambda x: se(x),
            ),
            Entry(
                "ge",
                "ge(x)",
                "Gather and excite: depthwise convolutions see the context, and its nearest "
                "neighbours gate x.",
                lambda x: ge(x),
            ),
            Entry(
                "cbam",
                "cbam(x)",
                "CBAM: a gate a channel (mean and maximum share their layers), then a gate a "
                "position.",
                lambda x: cbam(x),
            ),
            Entry("se_resnet", "se_resnet18", "The gate ends the body of each residual block."),
        ),
    ),
    Family(
        "Re-parameterised convolutions",
        (
            Entry(
                "repvgg_unit",
                "repvgg_unit(x, 64)",
                "RepVGG: 3x3, 1x1 and identity, each with batch norm, in one sum.",
                lambda x: repvgg_unit(x, 64),
            ),
            Entry(
                "acnet",
                "acnet(x, 64)",
                "ACNet: a square convolution and its skeleton.",
                lambda x: acnet(x, 64),
            ),
            Entry(
                "dbb",
                "dbb(x, 64)",
                "The diverse branch block: 3x3, 1x1, 1x1 then 3x3, 1x1 then average.",
                lambda x: dbb(x, 64),
            ),
            Entry("repvgg", "repvgg", "Long stages of one unit, drawn once each."),
        ),
    ),
    Family(
        "Learned connectivity (Ahmed & Torresani, arXiv 1709.09582, 1807.11473, 1704.06010)",
        (
            Entry(
                "masked_resnext",
                "masked_resnext:depth=11,cardinality=4",
                "Every block of a module adds up what it reads of the blocks before: a gate at "
                "each edge, K of C open.",
            ),
            Entry(
                "masked_resnext_8",
                "masked_resnext:depth=20",
                "Eight blocks a module: drawn once, and so are their gates.",
            ),
            Entry(
                "masked_resnet",
                "masked_resnet:depth=8,k=2",
                "Every module reads K of all modules before.",
            ),
            Entry(
                "branch_connect",
                "branch_connect",
                "Branches of one stem, and gates by which each class chooses K of them.",
            ),
            Entry("resnext", "resnext", "ResNeXt with its paths as one grouped convolution."),
            Entry(
                "resnext_branches",
                "resnext:form=branches",
                "The same function with its paths as branches.",
            ),
        ),
    ),
    Family(
        "Virtual branching (arXiv 1803.05872 and what followed)",
        (
            Entry(
                "fcn",
                "fcn:branches=2,shared=0.5",
                "Two branches of one input; the second says which of its parameters it shares.",
            ),
            Entry(
                "cnn",
                "cnn:branches=2,shared=0.5,merge=mean",
                "Two branches whose outputs meet in their mean.",
            ),
            Entry(
                "vbranch_resnet",
                "vbranch_resnet18:branches=2,shared=0.5",
                "Two residual networks side by side.",
            ),
            Entry(
                "densenet_bc",
                "densenet_bc:depth=16",
                "Dense blocks: each unit appends its channels to all before it.",
            ),
            Entry("densenet", "densenet121", "DenseNet-121, the plain network."),
        ),
    ),
    Family(
        "Inception (Szegedy et al., arXiv 1512.00567)",
        (
            Entry(
                "inception_v3",
                "inception_v3",
                "Blocks of parallel chains joined by concatenation; the auxiliary classifier hangs "
                "on the last block of 17x17.",
            ),
        ),
    ),
)


def palette() -> np.ndarray:
    """The colours of pictures: surfaces, and what ink on them is smoothed to."""
    surfaces = {look.fill for look in LOOKS.values()} | {BRANCH_FILL, SCOPE_FILL, "#FFFFFF"}
    inks = {"#1A1A1A", "#5A5A5A", "#FFFFFF", BRANCH_LINE}
    lines = {look.line for look in LOOKS.values()} | {REPEAT_LINE, SCOPE_LINE, "#2F5688"}
    colours = {_mixed(s, i, k / 4) for s in surfaces for i in inks for k in range(4)}
    colours |= {_mixed(line, "#FFFFFF", k / 2) for line in lines for k in range(2)}
    return np.array(sorted(colours))


def _mixed(a: str, b: str, share: float) -> tuple[int, ...]:
    """The colour between `a` and `b`, as red, green and blue."""
    pairs = zip(ImageColor.getrgb(a), ImageColor.getrgb(b))
    return tuple(round((1 - share) * x + share * y) for x, y in pairs)


def shrink(path: Path) -> None:
    """Write a picture with the colours of the palette only: a third of the bytes will do."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
    seen, which = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_inverse=True)
    known = palette()
    apart = np.stack([seen >> 16, seen >> 8 & 255, seen & 255], axis=1)[:, None] - known
    nearest = (apart**2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    flat = Image.fromarray(nearest[which].reshape(pixels.shape[:2]))
    flat.putpalette(known.astype(np.uint8).tobytes())
    flat.save(path, optimize=True)


def draw(entries: Iterable[Entry], folder: Path) -> None:
    """A PNG of each entry in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = folder / f"{entry.name}.png"
        render(entry.graph(), path, dpi=DPI)
        shrink(path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def page(families: Iterable[Family]) -> str:
    """The page of all pictures."""
    lines = ["# Networks", "", _HEAD]
    for family in families:
        lines += ["", f"## {family.title}"]
        for entry in family.entries:
            lines += ["", f"### {entry.name}", "", _line(entry), "", _picture(entry)]
    return "\n".join([*lines, ""])


_HEAD = """\
Every network of the package in a form that is small enough to read, drawn by
`python tools/draw_networks.py`; `branchgraph show SPEC -o FILE` draws any other. Data flows from
top to bottom. Equal blocks in a row and five or more equal branches are drawn once, in a cluster
with a thick line that says how often."""


def _line(entry: Entry) -> str:
    graph = entry.graph()
    numbers = counts(graph)
    said = [f"{cost(graph).per_sample().parameters:,} parameters"]
    said += [
        f"{n} {word if n > 1 else one}"
        for n, word, one in (
            (numbers.branches, "branches", "branch"),
            (numbers.merges, "merges", "merge"),
            (numbers.gates, "gates", "gate"),
            (numbers.exits, "exits", "exit"),
        )
        if n
    ]
    return f"{entry.look} `{entry.spec}`: {', '.join(said)}."


def _picture(entry: Entry) -> str:
    return f"![{entry.name}](images/networks/{entry.name}.png)"


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheet and write its page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="draw these only")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args(arguments)
    entries = {e.name: e for family in SHEET for e in family.entries}
    unknown = [name for name in options.names if name not in entries]
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; there are {', '.join(entries)}")
    chosen = [entries[name] for name in options.names or entries]
    draw(chosen, options.docs / "images" / "networks")
    (options.docs / "networks.md").write_text(page(SHEET))


if __name__ == "__main__":
    main()
