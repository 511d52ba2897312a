"""ResNet whose modules choose K of all modules before (1807.11473).

    x_i = relu( sum_{k<i} m_ik (r_k + s_k / K_i) ),   r_i = F(x_i),  s_i = S(x_i),  K_i = min(K, i)

Module 0 is the stem, r_0 = 0. Residual and shortcut stay apart because consumers have different
fan-ins; scaling the shortcut keeps the gain of the identity path at 1, and reading only the module
before is ResNet (He et al., 1512.03385). Shortcuts and edges that cross a stage have no parameters:
every other position, and zeros for the new channels.
"""

from __future__ import annotations

from branchgraph.ir.builder import average_pool, merge_sum, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Scope, Value, at, branch, scope
from branchgraph.ir.ops.reshape import Embed
from branchgraph.nets.connectivity.wiring import chosen, drawn, gated_sum, mask_rows, within
from branchgraph.nets.units import TORCH

_NET = "masked_resnet"
_POLICIES = ("learned", "previous", "all", "random")


def masked_resnet(
    depth: int = 38, k: int = 10, classes: int = 10, policy: str = "learned",
    widths: tuple[int, ...] = (16, 32, 64), size: int = 32, channels: int = 3, seed: int = 0,
) -> Graph:  # fmt: skip
    """ResNet in which each module reads K earlier modules; output `logits` [N, classes].

    Depth is 6 n + 2: n modules a stage. Policies are `learned`, `previous` (plain ResNet), `all`
    and `random`, drawn from `seed`. Every policy has the parameters of ResNet: 561 370 at depth 38.
    """
    chosen(_NET, "policy", policy, _POLICIES)
    if depth < 8 or (depth - 2) % 6:
        raise GraphError(f"{_NET}: depth is 6 n + 2, got {depth}")
    if len(widths) != 3 or list(widths) != sorted(widths) or widths[0] < 1:
        raise GraphError(f"{_NET}: widths are three channel counts that do not fall, got {widths}")
    within(_NET, "k", k, 1)
    within(_NET, "seed", seed, 0)
    graph = Graph(_NET)
    x = graph.input("x", ("N", channels, within(_NET, "size", size, 4), size))
    trunk = _Trunk(widths, TORCH.unit(x, widths[0], 3, name="stem"))
    count = (depth - 2) // 6
    for i in range(1, 3 * count + 1):
        with scope(f"module{i}"):
            trunk.module(trunk.read(i, k, policy, seed), (i - 1) // count)
    with scope("head"):
        h = relu(trunk.term(3 * count, 1, 2), name="relu")
    graph.output("logits", TORCH.head(h, within(_NET, "classes", classes, 1)))
    return graph


class _Trunk:
    """The modules so far."""

    def __init__(self, widths: tuple[int, ...], stem: Value) -> None:
        self.widths = widths
        #: Residual (none for the stem), shortcut and stage of each module.
        self.made: list[tuple[Value | None, Value, int]] = [(None, stem, 0)]
        self.terms: dict[tuple[int, int, int], Value] = {}

    def module(self, x: Value, stage: int) -> None:
        """A basic block at `x`."""
        before, width = self.made[-1][2], self.widths[stage]
        with branch("residual"):
            h = TORCH.unit(x, width, 3, stride=2 if stage > before else 1, name="first")
            r = TORCH.unit(h, width, 3, activate=False, name="second")
        self.made.append((r, self.adapted(x, before, stage), stage))

    def read(self, i: int, k: int, policy: str, seed: int) -> Value:
        """x_i."""
        if i == 1:
            return self.made[0][1]
        fan_in = {"previous": 1, "all": i}.get(policy, min(k, i))
        read = list(range(i))
        if policy == "previous":
            read = [i - 1]
        elif policy == "random":
            read = drawn(seed, i, 0, i, fan_in)
        # The stage of x_i is that of the module before, the latest that can be read.
        terms = [self.term(n, fan_in, self.made[-1][2]) for n in read]
        if policy == "learned" and fan_in < i:
            return relu(gated_sum(terms, mask_rows(terms[0].graph, 1, i, fan_in)), name="relu")
        return relu(terms[0] if len(terms) == 1 else merge_sum(*terms, name="merge"), name="relu")

    def term(self, n: int, fan_in: int, stage: int) -> Value:
        """r_n + s_n / fan_in in the shape of `stage`; made once, in the scope of module n."""
        key = (n, fan_in, stage)
        if key not in self.terms:
            r, s, made_at = self.made[n]
            with at((Scope(f"module{n}" if n else "stem"),)):
                if stage > made_at:
                    value = self.adapted(self.term(n, fan_in, made_at), made_at, stage)
                else:
                    scaled = s * (1.0 / fan_in) if fan_in > 1 else s
                    value = scaled if r is None else merge_sum(r, scaled, name="sum")
            self.terms[key] = value
        return self.terms[key]

    def adapted(self, x: Value, stage: int, to: int) -> Value:
        """`x` of one stage in the shape of a later one."""
        if stage == to:
            return x
        thinned = average_pool(x, 1, stride=2 ** (to - stage))
        return x.graph.emit(Embed(axis=1, start=0, size=self.widths[to]), thinned)
