"""Folding batch norm with fixed statistics into the convolution or dense layer before it.

For y = gamma (z - mu) / sqrt(var + eps) + beta with z = conv(x; W) + b, per output channel o:

    a[o]   = gamma[o] / sqrt(var[o] + eps)
    W'[o]  = a[o] W[o]
    b'[o]  = beta[o] + (b[o] - mu[o]) a[o]                        b = 0 where there is none
    y      = conv(x; W') + b'

Exact for any stride, pad, dilation and groups. It needs fixed statistics (`batch_norm_inference`,
after `specialise(training=False)`) and that nothing else reads z. W' and b' are parameter
expressions; `materialise` evaluates them in float64. (ParaDise, rule R1; RepVGG, arXiv 2101.03697.)
"""

from __future__ import annotations

from dataclasses import dataclass

from branchgraph.ir.graph import Graph, Node, at
from branchgraph.ir.op import make
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.norm import BatchNorm, BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.passes.base import Pass, Report


@dataclass(frozen=True)
class FoldBatchNorm(Pass, spelling="fold_batch_norm", claim="exact"):
    """Absorb inference batch norms into the layers before them."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        for node in graph.nodes:
            if isinstance(node.op, (BatchNorm, BatchNormTraining)):
                report.refused(node, "its statistics are not fixed; specialise(training=False)")
            elif isinstance(node.op, BatchNormInference):
                reason = self._reason(graph, node)
                if reason:
                    report.refused(node, reason)
                else:
                    report.matched(node)
                    self._fold(graph, node, node.op.eps)

    def _reason(self, graph: Graph, node: Node) -> str:
        """Why `node` cannot be folded, or nothing."""
        z = node.inputs[0]
        if z.producer is None or not isinstance(z.producer.op, (Conv, Dense)):
            return "no convolution or dense layer feeds it"
        if z.users != [node] or z in graph.roots:
            return f"{z.label} is read elsewhere too"
        return ""

    def _fold(self, graph: Graph, node: Node, eps: float) -> None:
        z, gamma, beta, mean, var = node.inputs
        layer = z.producer
        assert layer is not None
        x, weight, *bias = layer.inputs
        with at(layer.scope):
            scale = gamma / graph.emit(make("sqrt"), var + eps)
            shift = (bias[0] - mean) * scale if bias else -(mean * scale)
            column = (weight.shape[0], *(1,) * (len(weight.shape) - 1))
            rows = graph.emit(Reshape(shape=column), scale)
            folded = graph.emit(make("multiply"), weight, rows, name=f"{layer.name}.weight")
            new_bias = graph.emit(make("add"), beta, shift, name=f"{layer.name}.bias")
            y = graph.emit(layer.op, x, folded, new_bias, name=layer.name)
        graph.replace(node.output, y)
        graph.remove(node)
        graph.remove(layer)
