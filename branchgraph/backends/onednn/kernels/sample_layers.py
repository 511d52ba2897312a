"""Convolutions whose kernel belongs to the sample, and their gradients: one convolution a sample.

All samples share one primitive. One convolution with all samples as groups would do as well, but
its operand would have to lie [H, W, N, C], and few channels a group are slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import arranged, computable, desc, fpmath
from branchgraph.backends.onednn.kernels.layers import grouped, packed, window
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Desc,
    Primitive,
    convolution_backward_data,
    convolution_backward_weights,
    convolution_forward,
    reorder,
)
from branchgraph.backends.onednn.tensors import Tensor, channels_last, row_major
from branchgraph.ir.ops.sample_conv import (
    SampleConv,
    SampleConvTranspose,
    SampleConvWeightGradient,
)


def forward(site: Site) -> bool:
    """Every sample convolved with its own kernel."""
    op = site.op
    if not isinstance(op, SampleConv) or not computable(*site.inputs):
        return False
    given, weights, *biases = site.inputs
    out = site.output(site.first.writes[0], last=True)
    if not computable(out):
        return False
    x, weights = arranged(site, given), arranged(site, weights, last=False)
    biases = [arranged(site, b) for b in biases]
    images, results, kernels = list(_images(x)), list(_images(out)), list(_kernels(weights, op))
    vectors = [_row(biases[0], n) for n in range(x.shape[0])] if biases else []
    try:
        primitive = convolution_forward(
            desc(images[0]), _any(kernels[0]), desc(vectors[0]) if vectors else None,
            desc(results[0]), **window(op), attributes=Attributes(fpmath=fpmath(site)),
        )  # fmt: skip
    except OneDNNError:
        return False
    for n, (image, kernel, result) in enumerate(zip(images, kernels, results)):
        reads = {Arg.SRC: image, Arg.WEIGHTS: packed(site, kernel, primitive.desc("weights"))}
        if vectors:
            reads[Arg.BIAS] = vectors[n]
        site.primitive(primitive, reads, {Arg.DST: result})
    return True


def data_gradient(site: Site) -> bool:
    """The transpose in the samples."""
    op = site.op
    if not isinstance(op, SampleConvTranspose) or not computable(*site.inputs):
        return False
    given, weights = site.inputs
    out = site.output(site.first.writes[0], last=True)
    if not computable(out):
        return False
    dy, weights = arranged(site, given), arranged(site, weights, last=False)
    images, results, kernels = list(_images(dy)), list(_images(out)), list(_kernels(weights, op))
    descs = (desc(results[0]), _any(kernels[0]), desc(images[0]))
    try:
        hint = convolution_forward(*descs[:2], None, descs[2], **window(op), training=True)
        primitive = convolution_backward_data(
            *descs, **window(op), hint=hint, attributes=Attributes(fpmath=fpmath(site))
        )
    except OneDNNError:
        return False
    for image, kernel, result in zip(images, kernels, results):
        weight = packed(site, kernel, primitive.desc("weights"))
        reads = {Arg.DIFF_DST: image, Arg.WEIGHTS: weight}
        site.primitive(primitive, reads, {Arg.DIFF_SRC: result})
    return True


def weight_gradient(site: Site) -> bool:
    """The transpose in the kernels."""
    op = site.op
    if not isinstance(op, SampleConvWeightGradient) or not computable(*site.inputs):
        return False
    out = site.output(site.first.writes[0])
    if not computable(out):
        return False
    x, dy = (arranged(site, t) for t in site.inputs)
    images, cotangents, kernels = list(_images(x)), list(_images(dy)), list(_kernels(out, op))
    source, layout, target = desc(images[0]), _any(kernels[0]), desc(cotangents[0])
    try:
        hint = convolution_forward(source, layout, None, target, **window(op), training=True)
        primitive = convolution_backward_weights(
            source, layout, None, target, **window(op), hint=hint,
            attributes=Attributes(fpmath=fpmath(site)),
        )  # fmt: skip
        unpack = reorder(primitive.desc("diff_weights"), desc(kernels[0]))
    except OneDNNError:
        return False
    for image, cotangent, kernel in zip(images, cotangents, kernels):
        _one_gradient(site, primitive, unpack, {Arg.SRC: image, Arg.DIFF_DST: cotangent}, kernel)
    return True


def _one_gradient(
    site: Site, primitive: Primitive, unpack: Primitive, reads: dict[int, Tensor], kernel: Tensor
) -> None:
    made = primitive.desc("diff_weights")
    if made == desc(kernel):
        site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: kernel})
        return
    blocked = site.builder.opaque(made)
    site.primitive(primitive, reads, {Arg.DIFF_WEIGHTS: blocked})
    site.primitive(unpack, {Arg.SRC: blocked}, {Arg.DST: kernel})


def _row(tensor: Tensor, n: int, shape: tuple[int, ...] | None = None) -> Tensor:
    """Sample `n` of a dense tensor, row-major in `shape`."""
    shape = tensor.shape[1:] if shape is None else shape
    offset = n * tensor.strides[0] * tensor.dtype.itemsize
    return tensor.viewed(shape, row_major(shape), offset)


def _images(tensor: Tensor) -> Iterator[Tensor]:
    """Samples as batches of one, channels last."""
    shape = (1, *tensor.shape[1:])
    for n in range(tensor.shape[0]):
        yield _row(tensor, n, shape).viewed(shape, channels_last(shape))


def _kernels(weights: Tensor, op: Any) -> Iterator[Tensor]:
    """The kernel of every sample."""
    for n in range(weights.shape[0]):
        yield grouped(_row(weights, n), op.groups)


def _any(tensor: Tensor) -> Desc:
    return Desc.any(tensor.shape, tensor.dtype)
