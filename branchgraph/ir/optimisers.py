"""Optimiser rules: from gradients to updates, as ordinary nodes.

A rule maps a parameter p, its gradient g and its slots to their new values; every product below is
element by element, `mean(a, x, w)` is a + w (x - a), and slots start at 0 unless said.

    SGD                   p <- p - lr g
    MomentumSGD           v <- mu v - lr g;  p <- p + v
    CorrectedMomentumSGD  v <- mu v - g;  p <- p + lr v
    NesterovAG            v <- mu v - lr g;  p <- p + mu^2 v - (1 + mu) lr g
    Adam                  m <- mean(m, g, 1 - b1);  v <- mean(v, g^2, 1 - b2);  u = v
                          a = lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(u) + eps)
                          p <- (1 - eta wd) p - eta a m
    RMSprop               ms <- mean(ms, g^2, 1 - alpha);  p <- p - lr g / (sqrt(ms) + eps)
    RMSpropGraves         n <- mean(n, g^2, 1 - alpha);  g' <- mean(g', g, 1 - alpha)
                          d <- mu d - lr g / sqrt(n - g'^2 + eps);  p <- p + d
    AdaGrad               h <- h + g^2;  p <- p - lr g / (sqrt(h) + eps)
    AdaDelta              msg <- mean(msg, g^2, 1 - rho);  d = g sqrt((msdx + eps) / (msg + eps))
                          msdx <- mean(msdx, d^2, 1 - rho);  p <- p - lr d
    SMORMS3               r = 1 / (mem + 1);  g' <- mean(g', g, r);  g2 <- mean(g2, g^2, r)
                          x = g'^2 / (g2 + eps);  p <- p - min(x, lr) g / (sqrt(g2) + eps)
                          mem <- 1 + mem (1 - x), from 1
    MaskSGD               p <- clip(p / sum p - lr g, 0, 1), sums along rows

A rule reads its numbers as 0-d values of the parameter's dtype. They are computed in float64 and
cast once: by nodes from the 0-d input `learning_rate`, so that a schedule never recompiles, or from
plain numbers by a front end that feeds them. Gate scores may have a rule of their own (`gates`),
with the input `gates.learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from branchgraph.ir.attributes import field_types
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.graph import Graph, Value, scope
from branchgraph.ir.hooks import Gradients, Hook
from branchgraph.ir.initialisers import Constant, Zeros
from branchgraph.ir.masks import normalised
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import Clip, cast, compare, where
from branchgraph.ir.rebuild import clone
from branchgraph.ir.spec import arguments_for, parse_spec
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType

LEARNING_RATE = "learning_rate"

#: A number known now, or a 0-d float64 value of the graph.
Number = Value | float

#: The new value of a parameter, and those of its slots by name.
Updated = tuple[Value, dict[str, Value]]


@dataclass
class Optimiser:
    """Base: makes the states a rule needs once, and keeps them for every graph it is applied to."""

    learning_rate: float = 0.01
    slots: dict[tuple[State | None, str], State] = field(default_factory=dict, repr=False)
    #: What is done to gradients before the rule, in order.
    hooks: tuple[Hook, ...] = ()
    #: The rule of gate scores, if another: it has its own hooks, and those above pass gates by.
    gates: Optimiser | None = None
    spelling: ClassVar[str] = ""
    #: Names of the slots beside a parameter, and what they start from.
    starts: ClassVar[Mapping[str, float]] = {}
    #: Whether `scalars` depends on the number of the update.
    counted: ClassVar[bool] = False

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        """The numbers that the rule reads, by name, at learning rate `rate` in update `t`."""
        raise NotImplementedError

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        """Emit the update of one parameter into the graph of its operands, all of one dtype."""
        raise NotImplementedError

    def attach(self, graph: Graph) -> Graph:
        """A copy of `graph` in which every state with a gradient is updated."""
        if not graph.gradients:
            raise GraphError("the graph has no gradients; call differentiate(graph) first")
        new = clone(graph)
        gradients = dict(new.gradients)
        if self.gates is None:
            self.extend(new, gradients)
            return new
        scores = {s: g for s, g in gradients.items() if s.role is Role.GATE}
        self.extend(new, {s: g for s, g in gradients.items() if s not in scores})
        self.gates.extend(new, scores, f"gates.{LEARNING_RATE}")
        return new

    def extend(self, graph: Graph, gradients: Gradients, rate_name: str = LEARNING_RATE) -> None:
        """Add to `graph` the updates of the states with `gradients`."""
        if not gradients:
            return
        rate = graph.inputs.get(rate_name) or graph.input(
            rate_name, (), DType.F64, default=self.learning_rate
        )
        with scope("optimiser"):
            counts = self.counted or any(hook.counted for hook in self.hooks)
            t = self.step(graph) if counts else graph.constant(1.0, DType.F64)
            for hook in self.hooks:
                gradients = hook.apply(graph, gradients, t)
            numbers = self.scalars(rate, t if self.counted else 0.0)
            fitted: dict[DType, dict[str, Value]] = {}
            for state, gradient in gradients.items():
                if state.dtype not in fitted:
                    fitted[state.dtype] = {
                        k: _fit(graph, number, state.dtype) for k, number in numbers.items()
                    }
                self._move(state, gradient, fitted[state.dtype])

    def _move(self, state: State, gradient: Value, scalars: Mapping[str, Value]) -> None:
        """Update one state and its slots."""
        graph = gradient.graph
        states = {name: self.slot(state, name) for name in self.starts}
        before = {name: graph.read(slot) for name, slot in states.items()}
        moved, after = self.rule(graph.read(state), gradient, before, scalars)
        for name, slot in states.items():
            graph.update(slot, after[name])
        graph.update(state, moved)

    def slot(self, state: State, name: str) -> State:
        """The optimiser's own state `name` beside a parameter."""
        key = (state, name)
        if key not in self.slots:
            full_name = f"{state.name}.{self.spelling}.{name}"
            start = self.starts[name]
            init = Constant(start) if start else Zeros()
            self.slots[key] = State(full_name, state.shape, state.dtype, Role.SLOT, init)
        return self.slots[key]

    def step(self, graph: Graph) -> Value:
        """The number of this update, counted from 1, as float64."""
        key = (None, "step")
        if key not in self.slots:
            self.slots[key] = State(f"{self.spelling}.step", (), DType.I64, Role.STEP, Zeros())
        state = self.slots[key]
        count = graph.read(state) + 1
        graph.update(state, count)
        return cast(count, DType.F64)


@dataclass
class SGD(Optimiser):
    """Plain stochastic gradient descent."""

    spelling = "sgd"

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        return p - g * scalars["rate"], {}


@dataclass
class MomentumSGD(Optimiser):
    """Gradient descent with heavy-ball momentum: v <- mu v - lr g;  p <- p + v.

    Polyak, Some methods of speeding up the convergence of iteration methods, 1964. A change of the
    learning rate acts on later gradients only, because v holds steps.
    """

    momentum: float = 0.9
    spelling = "momentum_sgd"
    starts: ClassVar[Mapping[str, float]] = {"v": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "momentum": self.momentum}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        v = slots["v"] * scalars["momentum"] - g * scalars["rate"]
        return p + v, {"v": v}


@dataclass
class CorrectedMomentumSGD(Optimiser):
    """Momentum over gradients: v <- mu v - g;  p <- p + lr v.

    A change of the learning rate acts on the whole of v (Goyal et al., arXiv 1706.02677, remark 2).
    """

    momentum: float = 0.9
    spelling = "corrected_momentum_sgd"
    starts: ClassVar[Mapping[str, float]] = {"v": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "momentum": self.momentum}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        v = slots["v"] * scalars["momentum"] - g
        return p + v * scalars["rate"], {"v": v}


@dataclass
class NesterovAG(Optimiser):
    """Accelerated gradient: v <- mu v - lr g;  p <- p + mu^2 v - (1 + mu) lr g, with the new v.

    Nesterov 1983 in the form of Bengio et al. (arXiv 1212.0901), where p is the point at which the
    gradient is taken. As in Chainer, the new v is the one that mu^2 multiplies.
    """

    momentum: float = 0.9
    spelling = "nesterov_ag"
    starts: ClassVar[Mapping[str, float]] = {"v": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        mu = self.momentum
        return {"rate": rate, "momentum": mu, "again": mu * mu, "ahead": rate * (1.0 + mu)}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        v = slots["v"] * scalars["momentum"] - g * scalars["rate"]
        return p + (v * scalars["again"] - g * scalars["ahead"]), {"v": v}


@dataclass
class Adam(Optimiser):
    """Adaptive moments: m and v are running means of g and g^2.

        a = lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(u) + eps);  p <- (1 - eta wd) p - eta a m

    u = v, and with `amsgrad` u is the greatest v so far. With `adabound` a is clipped to

        [f (1 - 1 / (gamma t + 1)), f (1 + 1 / (gamma t))],   f = final_lr lr / lr0,

    lr0 being the learning rate the rule was made with. Kingma & Ba (arXiv 1412.6980) with eps added
    to the uncorrected root, as Chainer does; decoupled decay `weight_decay_rate` (AdamW, Loshchilov
    & Hutter, arXiv 1711.05101); AMSGrad of Reddi et al. (ICLR 2018); AdaBound of Luo et al.
    (arXiv 1902.09843).
    """

    learning_rate: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eta: float = 1.0
    weight_decay_rate: float = 0.0
    amsgrad: bool = False
    adabound: bool = False
    final_lr: float = 0.1
    gamma: float = 1e-3
    spelling = "adam"
    counted = True

    @property
    def starts(self) -> Mapping[str, float]:  # type: ignore[override]
        """`vhat` exists only where it is needed."""
        names = ("m", "v", "vhat") if self.amsgrad else ("m", "v")
        return dict.fromkeys(names, 0.0)

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        corrected = rate * _root(1.0 - _power(self.beta2, t)) / (1.0 - _power(self.beta1, t))
        numbers: dict[str, Number] = {
            "rate": corrected, "new_m": 1.0 - self.beta1, "new_v": 1.0 - self.beta2,
            "eps": self.eps,
        }  # fmt: skip
        if self.eta != 1.0:
            numbers["eta"] = self.eta
        if self.weight_decay_rate:
            numbers["kept"] = 1.0 - self.eta * self.weight_decay_rate
        if self.adabound:
            last = rate * (self.final_lr / self.learning_rate)
            numbers["lower"] = last * (1.0 - 1.0 / (t * self.gamma + 1.0))
            numbers["upper"] = last * (1.0 + 1.0 / (t * self.gamma))
        return numbers

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        m = _mean(slots["m"], g, scalars["new_m"])
        v = _mean(slots["v"], g * g, scalars["new_v"])
        new = {"m": m, "v": v}
        if self.amsgrad:
            new["vhat"] = _greater(slots["vhat"], v)
        root = _root(new.get("vhat", v)) + scalars["eps"]
        if self.adabound:
            bounded = _greater(scalars["rate"] / root, scalars["lower"])
            step = _smaller(bounded, scalars["upper"]) * m
        else:
            step = scalars["rate"] * m / root
        if "eta" in scalars:
            step = step * scalars["eta"]
        kept = p * scalars["kept"] if "kept" in scalars else p
        return kept - step, new


@dataclass
class RMSprop(Optimiser):
    """Steps divided by the root of the running mean of g^2; eps outside or inside of the root.

    Tieleman & Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    eps_inside_sqrt: bool = False
    spelling = "rmsprop"
    starts: ClassVar[Mapping[str, float]] = {"ms": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "new": 1.0 - self.alpha, "eps": self.eps}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        ms, eps = _mean(slots["ms"], g * g, scalars["new"]), scalars["eps"]
        root = _root(ms + eps) if self.eps_inside_sqrt else _root(ms) + eps
        return p - g * scalars["rate"] / root, {"ms": ms}


@dataclass
class RMSpropGraves(Optimiser):
    """Steps divided by the running standard deviation of g, with momentum.

        d <- mu d - lr g / sqrt(n - g'^2 + eps);  p <- p + d

    n and g' are running means of g^2 and g (Graves, arXiv 1308.0850, equations 38 to 45).
    """

    learning_rate: float = 1e-4
    alpha: float = 0.95
    momentum: float = 0.9
    eps: float = 1e-4
    spelling = "rmsprop_graves"
    starts: ClassVar[Mapping[str, float]] = {"n": 0.0, "g": 0.0, "delta": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "new": 1.0 - self.alpha, "momentum": self.momentum, "eps": self.eps}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        n = _mean(slots["n"], g * g, scalars["new"])
        mean = _mean(slots["g"], g, scalars["new"])
        deviation = _root(n - mean * mean + scalars["eps"])
        delta = slots["delta"] * scalars["momentum"] - g * scalars["rate"] / deviation
        return p + delta, {"n": n, "g": mean, "delta": delta}


@dataclass
class AdaGrad(Optimiser):
    """Steps divided by the root of the sum of all g^2 so far (Duchi, Hazan & Singer, JMLR 2011)."""

    learning_rate: float = 0.001
    eps: float = 1e-8
    spelling = "adagrad"
    starts: ClassVar[Mapping[str, float]] = {"h": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "eps": self.eps}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        h = slots["h"] + g * g
        return p - g * scalars["rate"] / (_root(h) + scalars["eps"]), {"h": h}


@dataclass
class AdaDelta(Optimiser):
    """Steps in the parameter's own units: the root of mean d^2 over that of mean g^2, times g.

    Zeiler, arXiv 1212.5701; the learning rate multiplies the step and is 1 in the paper.
    """

    learning_rate: float = 1.0
    rho: float = 0.95
    eps: float = 1e-6
    spelling = "adadelta"
    starts: ClassVar[Mapping[str, float]] = {"msg": 0.0, "msdx": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        numbers: dict[str, Number] = {"new": 1.0 - self.rho, "eps": self.eps}
        if isinstance(rate, Value) or rate != 1.0:
            numbers["rate"] = rate
        return numbers

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        eps = scalars["eps"]
        msg = _mean(slots["msg"], g * g, scalars["new"])
        delta = _root((slots["msdx"] + eps) / (msg + eps)) * g
        msdx = _mean(slots["msdx"], delta * delta, scalars["new"])
        step = delta * scalars["rate"] if "rate" in scalars else delta
        return p - step, {"msg": msg, "msdx": msdx}


@dataclass
class SMORMS3(Optimiser):
    """Squared mean over root mean squared cubed: the memory shortens where gradients agree.

    S. Funk, RMSprop loses to SMORMS3, 2015 (sifter.org/~simon/journal/20150420.html).
    """

    learning_rate: float = 0.001
    eps: float = 1e-16
    spelling = "smorms3"
    starts: ClassVar[Mapping[str, float]] = {"mem": 1.0, "g": 0.0, "g2": 0.0}

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate, "eps": self.eps}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        mem, eps = slots["mem"], scalars["eps"]
        new = 1.0 / (mem + 1.0)
        mean, square = _mean(slots["g"], g, new), _mean(slots["g2"], g * g, new)
        agreement = mean * mean / (square + eps)
        moved = p - g * _smaller(agreement, scalars["rate"]) / (_root(square) + eps)
        return moved, {"mem": mem * (1.0 - agreement) + 1.0, "g": mean, "g2": square}


@dataclass
class MaskSGD(Optimiser):
    """Plain descent on rows that choose in proportion: p <- clip(p / sum p - lr g, 0, 1).

    Ahmed & Torresani, arXiv 1709.09582 and 1807.11473 (see `ir.masks`). Rows lie along the last
    axis. What is stored is not divided by its sum again until it is next read.
    """

    learning_rate: float = 0.2
    spelling = "mask_sgd"

    def scalars(self, rate: Number, t: Number) -> dict[str, Number]:
        return {"rate": rate}

    def rule(
        self, p: Value, g: Value, slots: Mapping[str, Value], scalars: Mapping[str, Value]
    ) -> Updated:
        moved = normalised(p) - g * scalars["rate"]
        return p.graph.emit(Clip(low=0.0, high=1.0), moved), {}


def _fit(graph: Graph, number: Number, dtype: DType) -> Value:
    """A scalar as a value of `dtype`."""
    return cast(number, dtype) if isinstance(number, Value) else graph.constant(number, dtype)


def _mean(old: Value, new: Value, weight: Value) -> Value:
    """The running mean `old` with `new` taken in by `weight`."""
    return old + (new - old) * weight


def _root(x: Number) -> Number:
    return x.graph.emit(make("sqrt"), x) if isinstance(x, Value) else math.sqrt(x)


def _power(base: float, exponent: Number) -> Number:
    """base^exponent for a base that is not negative, as e^(exponent ln base)."""
    if not isinstance(exponent, Value):
        return float(base**exponent)
    if base == 0.0:
        return 0.0
    return exponent.graph.emit(make("exp"), exponent * math.log(base))


def _smaller(x: Value, bound: Value) -> Value:
    """The elements of x, those above the bound replaced by it; NaN stays."""
    return where(compare("greater", x, bound), bound, x)


def _greater(x: Value, bound: Value) -> Value:
    """The elements of x, those below the bound replaced by it; NaN stays."""
    return where(compare("less", x, bound), bound, x)


#: Spelling to rule.
OPTIMISERS: dict[str, type[Optimiser]] = {
    c.spelling: c
    for c in (
        SGD, MomentumSGD, CorrectedMomentumSGD, NesterovAG, Adam, RMSprop, RMSpropGraves, AdaGrad,
        AdaDelta, SMORMS3, MaskSGD,
    )
}  # fmt: skip


def optimiser(spec: str, hooks: tuple[Hook, ...] = ()) -> Optimiser:
    """A rule by specification string: `adam`, `momentum_sgd:learning_rate=0.1,gates=mask_sgd`.

    `gates` names the rule of gate scores, with its defaults. Raises `FormatError` for an unknown
    rule or option, listing what there is.
    """
    name, raw = parse_spec(spec)
    if name not in OPTIMISERS:
        raise FormatError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMISERS)}")
    cls = OPTIMISERS[name]
    options = {k: a for k, a in field_types(cls).items() if k not in ("slots", "hooks")}
    given = arguments_for(raw, {**options, "gates": str}, f"optimiser {name}")
    gates = given.pop("gates", None)
    return cls(**given, hooks=hooks, gates=optimiser(gates) if gates else None)
