"""Text before and after for the passes whose own tests compare structures instead."""

from __future__ import annotations

from branchgraph.ir.builder import batch_norm, conv, dense, merge_mean, merge_sum, relu
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.text import format_graph
from branchgraph.passes.base import Pass

ENSEMBLE = """\
graph pair {
  state left/fc.weight : f32[3, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state right/fc.weight : f32[3, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  input x : f32[N, 2]
  branch left {
    %0 = dense(x, left/fc.weight) : f32[N, 3]  # fc
  }
  branch right {
    %1 = dense(x, right/fc.weight) : f32[N, 3]  # fc
  }
  %2 = mean(%0, %1) : f32[N, 3]
  output y = %2
}
"""
LEFT = """\
graph pair {
  state left/fc.weight : f32[3, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  input x : f32[N, 2]
  %0 = dense(x, left/fc.weight) : f32[N, 3]  # fc
  output y = %0
}
"""


def test_split_ensemble_as_text() -> None:
    graph = Graph("pair")
    x = graph.input("x", ("N", 2))
    members = []
    for name in ("left", "right"):
        with branch(name):
            members.append(dense(x, 3, bias=False, name="fc"))
    graph.output("y", merge_mean(*members))
    assert format_graph(graph) == ENSEMBLE
    assert format_graph(Pass.from_spec("split_ensemble:branch=left").apply(graph)) == LEFT


GEOMETRY = "{stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]"
NORM = "{eps=2e-05, decay=0.9, unbiased=true} : f32[N, 1, 4, 4]"
RESIDUAL = f"""\
  %0 = conv(x, c0.weight) {GEOMETRY}  # c0
  %1 = batch_norm(%0, n0.gamma, n0.beta, n0.running_mean, n0.running_var) {NORM}  # n0
  %2 = relu(%1) : f32[N, 1, 4, 4]
  %3 = conv(%2, c1.weight) {GEOMETRY}  # c1
  %4 = batch_norm(%3, n1.gamma, n1.beta, n1.running_mean, n1.running_var) {NORM}  # n1
  %5 = relu(%4) : f32[N, 1, 4, 4]
  %6 = conv(%5, c2.weight) {GEOMETRY}  # c2
  %7 = batch_norm(%6, n2.gamma, n2.beta, n2.running_mean, n2.running_var) {NORM}  # n2
  %8 = sum(%7, %2) : f32[N, 1, 4, 4]
  %9 = relu(%8) : f32[N, 1, 4, 4]
  output y = %9
}}
"""
PLAIN = f"""\
  %0 = conv(x, c0.weight) {GEOMETRY}  # c0
  %1 = batch_norm(%0, n0.gamma, n0.beta, n0.running_mean, n0.running_var) {NORM}  # n0
  %2 = relu(%1) : f32[N, 1, 4, 4]
  scope g1 {{
    scope b1 {{
      branch p1 {{
        scope "0" {{
          %3 = conv(%2, c1.weight) {GEOMETRY}  # conv
          %4 = batch_norm(%3, n1.gamma, n1.beta, n1.running_mean, n1.running_var) {NORM}  # bn
        }}
      }}
      %5 = relu(%4) : f32[N, 1, 4, 4]  # relu
    }}
    scope b2 {{
      branch p1 {{
        scope "0" {{
          %6 = conv(%5, c2.weight) {GEOMETRY}  # conv
          %7 = batch_norm(%6, n2.gamma, n2.beta, n2.running_mean, n2.running_var) {NORM}  # bn
        }}
      }}
      %8 = relu(%7) : f32[N, 1, 4, 4]  # relu
    }}
  }}
  output y = %8
}}
"""


def unit(x: Value, k: int) -> Value:
    return batch_norm(conv(x, 1, 3, pad=1, bias=False, name=f"c{k}"), name=f"n{k}")


def test_merge_and_run_as_text() -> None:
    """A residual block gives the units of a plain network, with their states."""
    graph = Graph("two")
    h = relu(unit(graph.input("x", ("N", 1, 4, 4)), 0))
    graph.output("y", relu(merge_sum(unit(relu(unit(h, 1)), 2), h)))
    plain = Pass.from_spec("merge_and_run:to=plain").apply(graph)
    header, body = format_graph(graph).split("  input x : f32[N, 1, 4, 4]\n")
    assert body == RESIDUAL
    assert format_graph(plain).split("  input x : f32[N, 1, 4, 4]\n") == [header, PLAIN]
