"""Repeats: parts of a network that a picture draws once, with `×n`.

In a row: parts U_1 ... U_n of one form (`show.forms`), side by side in a scope, where

    U_k, k > 1, reads what U_{k-1} hands on, from the same places for all k, and what all read;
    what U_k hands on is read by U_{k+1} alone, for k < n;
    U_n hands on nothing else than the others do.

A part is a scope, or a few layers that stand in none. In parallel: operands 1 ... n > 4 of a merge,
one after another, each with an arm of one form that leads nowhere but there. All arms read the same
values, or each its own slice of them, evenly spaced. So are more than four equal scopes side by
side that lead to the same merges, each through gates of its own.

The first is drawn; what reads the last reads the first. Nothing repeats where an inner value is
read from elsewhere, so an exit behind block 5 ends the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile

from branchgraph.ir.graph import Location, Node, Scope, Value
from branchgraph.show import describe
from branchgraph.show.forms import Form, Forms
from branchgraph.show.style import Kind, kind

#: Fewest equal scopes, runs of layers and branches that are drawn as one.
FEWEST_BLOCKS, FEWEST_LAYERS, FEWEST_BRANCHES = 2, 3, 5
#: Most boxes and scopes in a repeated part that is no scope of its own.
_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Repeat:
    """`count` equal parts, of which the `first` is drawn, at `place` in a cluster `label`ed so.

    Without `own_scope` the first part has no scope of its own, and gets a cluster inside `place`.
    """

    first: frozenset[Node]
    count: int
    parallel: bool
    place: Location
    own_scope: bool
    label: str


@dataclass(frozen=True)
class _Item:
    """What stands side by side in a scope: an inner scope with all its nodes, or a box."""

    stacks: tuple[tuple[Node, ...], ...]
    scope: Scope | None

    @property
    def nodes(self) -> list[Node]:
        return [n for stack in self.stacks for n in stack]

    @property
    def name(self) -> str:
        return self.scope.name if self.scope else self.stacks[0][0].name

    @property
    def outline(self) -> tuple[object, ...]:
        """A quick look: parts of other outlines need not be compared further."""
        branch = self.scope.branch if self.scope else None
        return (branch, *map(len, self.stacks), self.stacks[0][0].op.opcode)


class Repeats:
    """The repeats among boxes (`stacks`) of drawn nodes. `roots` are values that others want."""

    def __init__(self, forms: Forms, stacks: Sequence[Sequence[Node]], roots: set[Value]) -> None:
        self.forms = forms
        self.roots = roots
        self.drawn = {n for stack in stacks for n in stack}
        self.hidden: set[Node] = set()
        self.found: list[Repeat] = []
        self._stand_in: dict[Value, Value] = {}
        self._sizes: dict[Location, int] = {}
        for node in self.drawn:
            for depth in range(1, len(node.scope) + 1):
                place = node.scope[:depth]
                self._sizes[place] = self._sizes.get(place, 0) + 1
        self._in_rows((), [tuple(s) for s in stacks])
        for node in sorted(self.drawn, key=forms.order.__getitem__, reverse=True):
            if kind(node) is Kind.MERGE and node not in self.hidden:
                self._in_parallel(node)

    def shown(self, value: Value) -> Value:
        """`value`, or what stands for it in the drawn part."""
        while value in self._stand_in:
            value = self._stand_in[value]
        return value

    def users(self, value: Value) -> list[Node]:
        """Drawn nodes that read `value`, through folded ones too."""
        found = [n for n in value.users if n in self.drawn]
        folded = [n for n in value.users if n in self.forms.folded]
        return found + [n for f in folded for v in f.outputs for n in self.users(v)]

    # -- in a row ------------------------------------------------------------------------------

    def _in_rows(self, place: Location, stacks: Sequence[tuple[Node, ...]]) -> None:
        """Find rows among what stands in `place`, then inside the scopes that are drawn."""
        items = _items(place, stacks)
        at = 0
        while at < len(items):
            row, period = self._longest_row(items, at, place)
            if row:
                self._draw_once(row, items[at : at + period * len(row)], period, place)
            else:
                row = self._siblings(items, at, place)
            for item in items[at : at + period]:
                if item.scope:
                    self._in_rows((*place, item.scope), item.stacks)
            at += period * max(len(row), 1)

    def _longest_row(self, items: list[_Item], at: int, place: Location) -> tuple[list[Form], int]:
        """The row from `at` that covers most items, and how many of them one part has."""
        best: tuple[list[Form], int] = ([], 1)
        for period in range(1, _LONGEST_PERIOD + 1):
            scoped = period == 1 and items[at].scope is not None
            fewest = FEWEST_BLOCKS if scoped else FEWEST_LAYERS
            if at + fewest * period > len(items):
                break
            row = self._row(items, at, period, place)
            if len(row) >= fewest and len(row) * period > len(best[0]) * best[1]:
                best = (row, period)
        return best

    def _row(self, items: list[_Item], at: int, period: int, place: Location) -> list[Form]:
        """Forms of the parts of `period` items each that make a row from `at`."""
        depth = len(place) + (period == 1 and items[at].scope is not None)
        outlines = [item.outline for item in items[at : at + period]]
        row: list[Form] = []
        links: tuple[object, ...] = ()
        for start in range(at, len(items) - period + 1, period):
            part = items[start : start + period]
            if [i.outline for i in part] != outlines:
                break
            form = self.forms.of([n for item in part for n in item.nodes], depth)
            if not row:
                row.append(form)
                continue
            seen = _links(row[-1], form, row[0])
            fits = form.like(row[0]) and form.starts == row[0].starts and (links or seen) == seen
            if not fits or not seen or not self._only_for(row[-1], form):
                break
            links = seen
            row.append(form)
        return self._closed(row, links)

    def _only_for(self, part: Form, after: Form) -> bool:
        """Whether `part` hands values on to `after` alone."""
        readers = set(after.nodes)
        leaving = self._leaving(part)
        return bool(leaving) and all(
            readers.issuperset(outer) and v not in self.roots for v, outer in leaving
        )

    def _leaving(self, part: Form) -> list[tuple[Value, set[Node]]]:
        """Values of `part` that are read outside, and by whom."""
        own = set(part.nodes)
        found = []
        for value in (v for n in part.nodes for v in n.outputs if n not in self.forms.folded):
            outer = set(self.users(value)) - own
            if outer or value in self.roots:
                found.append((value, outer))
        return found

    def _closed(self, row: list[Form], links: tuple[object, ...]) -> list[Form]:
        """`row` without a last part that hands on something else; empty if it runs in a circle."""
        while len(row) > 1:
            handed = {_position(row[-1], v) for v, _ in self._leaving(row[-1])}
            if handed <= set(links):
                break
            row = row[:-1]
        later = {n for form in row[1:] for n in form.nodes if n not in self.forms.folded}
        circular = any(v.producer in later for v in row[0].outside) if row else True
        return row if len(row) > 1 and not circular else []

    def _draw_once(self, row: list[Form], items: list[_Item], period: int, place: Location) -> None:
        first, last = row[0], row[-1]
        for value, _ in self._leaving(last):
            position = _position(last, value)
            self._stand_in[value] = first.nodes[position[0]].outputs[position[1]]
        names = [item.name for item in items] if period == 1 else []
        scoped = period == 1 and items[0].scope is not None
        label = _label(names, len(row), "", first.sharing)
        inside = (*place, items[0].scope) if scoped and items[0].scope else place
        self._keep_first(row, Repeat(self._own(first), len(row), False, inside, scoped, label))

    def _own(self, form: Form) -> frozenset[Node]:
        return frozenset(form.nodes) - self.forms.folded

    def _keep_first(self, forms: Sequence[Form], repeat: Repeat) -> None:
        self.hidden |= {n for form in forms[1:] for n in self._own(form)}
        self.found.append(repeat)

    # -- in parallel ---------------------------------------------------------------------------

    def _in_parallel(self, merge: Node) -> None:
        """Find runs of equal arms among the operands of `merge`."""
        if len(merge.inputs) < FEWEST_BRANCHES:
            return
        arms = [self._arm(v, merge) for v in merge.inputs]
        forms = [self.forms.of(a, len(merge.scope)) if a else None for a in arms]
        at = 0
        while at < len(forms):
            run = list(self._even(forms[at:]))
            if len(run) >= FEWEST_BRANCHES:
                self._draw_first_arm(run, merge, at)
            at += max(len(run), 1)

    def _siblings(self, items: list[_Item], at: int, place: Location) -> list[Form]:
        """Equal branches from item `at` on that lead to the same merges, each by gates of its own.

        These are the C blocks of a module whose successors choose among them.
        """
        outline, depth = items[at].outline, len(place) + 1
        scopes = list(takewhile(lambda i: i.scope and i.outline == outline, items[at:]))
        if len(scopes) < FEWEST_BRANCHES:
            return []
        goals = self._goals(self.forms.of(scopes[0].nodes, depth))
        forms = (self.forms.of(item.nodes, depth) for item in scopes if goals)
        run = list(self._even(takewhile(lambda f: self._goals(f) == goals, forms)))
        if len(run) < FEWEST_BRANCHES:
            return []
        first, last = scopes[0], scopes[len(run) - 1]
        for form in run[1:]:
            for value, _ in self._leaving(form):
                position, output = _position(form, value)
                self._stand_in[value] = run[0].nodes[position].outputs[output]
        label = _label([first.name, last.name], len(run), " branches", run[0].sharing)
        own = (*place, first.scope) if first.scope else place
        self._keep_first(run, Repeat(self._own(run[0]), len(run), True, own, True, label))
        return run

    def _goals(self, part: Form) -> list[tuple[tuple[int, int], set[Node]]]:
        """The merges that each leaving value reaches, through a gate or at once.

        Nothing where one leads elsewhere, or all to one merge around the part, which then looks
        for equal arms.
        """
        found = []
        for value, readers in self._leaving(part):
            merges: set[Node] = set()
            for reader in readers:
                gate = kind(reader) is Kind.GATE and self.roots.isdisjoint(reader.outputs)
                after = self.users(reader.output) if gate else [reader]
                if value in self.roots or any(kind(n) is not Kind.MERGE for n in after):
                    return []
                merges.update(after)
            found.append((_position(part, value), merges))
        goals = {n for _, merges in found for n in merges}
        place = part.nodes[-1].scope
        around = all(place[: len(n.scope)] == n.scope for n in goals)
        return found if len(goals) > 1 or not around else []

    def _arm(self, value: Value, merge: Node) -> list[Node]:
        """Nodes in the scope of `merge` that lead to nothing but its one operand `value`."""
        arm: dict[Node, None] = {}
        order = self.forms.order
        waiting: list[tuple[int, Node]] = []
        seen: set[Node | None] = {None, merge}

        def reach(before: Node | None) -> None:
            if before in self.drawn and before not in seen:
                seen.add(before)
                heappush(waiting, (-order[before], before))

        if merge.inputs.count(value) == 1:
            reach(value.producer)
        while waiting:
            node = heappop(waiting)[1]
            readers = {n for v in node.outputs for n in self.users(v)}
            inside = node.scope[: len(merge.scope)] == merge.scope
            alone = readers <= arm.keys() if arm else readers == {merge}
            if inside and alone and self.roots.isdisjoint(node.outputs):
                arm[node] = None
                for operand in node.inputs:
                    reach(operand.producer)
        return list(arm)

    def _draw_first_arm(self, run: list[Form], merge: Node, at: int) -> None:
        for value in merge.inputs[at + 1 : at + len(run)]:
            self._stand_in[value] = merge.inputs[at]
        arms = [self._own(form) for form in run]
        scopes = [self._scope_of(arm, len(merge.scope)) for arm in arms]
        scoped = len(set(scopes)) == len(scopes) and None not in scopes
        names = [s[-1].name for s in scopes if s] if scoped else []
        gates = all(kind(n) is Kind.GATE for n in arms[0])
        label = _label(names, len(run), " gates" if gates else " branches", run[0].sharing)
        place = scopes[0] if scoped and scopes[0] else merge.scope
        self._keep_first(run, Repeat(arms[0], len(run), True, place, scoped, label))

    def _scope_of(self, arm: frozenset[Node], depth: int) -> Location | None:
        """The scope deeper than `depth` that holds `arm` and nothing else."""
        places = [n.scope for n in arm]
        shared = min(places, key=len)
        while any(p[: len(shared)] != shared for p in places):
            shared = shared[:-1]
        exact = len(shared) > depth and self._sizes[shared] == len(arm)
        return shared if exact else None

    def _even(self, forms: Iterable[Form | None]) -> Iterator[Form]:
        """Leading forms that are alike and read the same, or evenly spaced shares of the same."""
        previous: Form | None = None
        steps: tuple[list[int], ...] | None = None
        for form in forms:
            if form is None or (previous and not form.like(previous)):
                return
            if previous:
                step = self._steps(previous, form)
                if step is None or (steps or step) != step:
                    return
                steps = step
            previous = form
            yield form

    def _steps(self, before: Form, form: Form) -> tuple[list[int], ...] | None:
        """How far slices and outputs of a split move on from one arm to the next."""
        moved = []
        for a, b in zip(before.outside, form.outside):
            same = self.shown(a) is self.shown(b)
            if not same and (a.producer is None or a.producer is not b.producer):
                return None
            moved.append(0 if same else b.index - a.index)
        return ([b - a for a, b in zip(before.starts, form.starts)], moved)


def _items(place: Location, stacks: Sequence[tuple[Node, ...]]) -> list[_Item]:
    """Boxes and inner scopes in `place`, in order of their first nodes."""
    found: dict[object, list[tuple[Node, ...]]] = {}
    for stack in stacks:
        inner = stack[0].scope[len(place) :]
        found.setdefault(inner[0] if inner else stack, []).append(stack)
    return [_Item(tuple(n), k if isinstance(k, Scope) else None) for k, n in found.items()]


def _position(form: Form, value: Value) -> tuple[int, int]:
    """Where in its part `value` comes from: which node, and which output."""
    assert value.producer is not None
    return (form.nodes.index(value.producer), value.index)


def _links(before: Form, form: Form, first: Form) -> tuple[object, ...]:
    """For each value that comes in: where the part before makes it, or the value all parts read.

    Empty if one value comes from elsewhere, or none comes from the part before.
    """
    places = {n: i for i, n in enumerate(before.nodes)}
    found: list[object] = []
    linked = False
    for value, at_first in zip(form.outside, first.outside):
        if value.producer in places:
            found.append((places[value.producer], value.index))
            linked = True
        elif value is at_first:
            found.append(value)
        else:
            return ()
    return tuple(found) if linked else ()


def _label(names: list[str], count: int, noun: str, sharing: str) -> str:
    """`block2 … block9 ×8`."""
    between = ", " if count == 2 else " … "
    named = names and all(names)
    spoken = f"{describe.clean(names[0])}{between}{describe.clean(names[-1])} " if named else ""
    return f"{spoken}×{count}{noun}" + (f" · {sharing}" if sharing else "")
