"""A predictor with a loss and an accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from branchgraph.chainer import functions as F
from branchgraph.chainer.link import Chain, Link


class Classifier(Chain):
    """Called with inputs and labels it returns the loss; `y`, `loss` and `accuracy` stay with it.

    `label_key` says which argument holds the labels: a position or a keyword.
    """

    compute_accuracy = True

    def __init__(
        self, predictor: Link, lossfun: Callable[..., Any] | None = None,
        accfun: Callable[..., Any] | None = None, label_key: int | str = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(label_key, (int, str)):
            raise TypeError(f"label_key is an int or a str, got {type(label_key).__name__}")
        self.lossfun = F.softmax_cross_entropy if lossfun is None else lossfun
        self.accfun = _accuracy if accfun is None else accfun
        self.label_key = label_key
        self.y: Any = None
        self.loss: Any = None
        self.accuracy: Any = None
        with self.init_scope():
            self.predictor = predictor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss."""
        args, kwargs, t = self._labels(args, kwargs)
        self.y = self.loss = self.accuracy = None
        self.y = self.predictor(*args, **kwargs)
        self.loss = self.lossfun(self.y, t)
        _report({"loss": self.loss}, self)
        if self.compute_accuracy:
            self.accuracy = self.accfun(self.y, t)
            _report({"accuracy": self.accuracy}, self)
        return self.loss

    def _labels(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        key = self.label_key
        if isinstance(key, str):
            if key not in kwargs:
                raise ValueError(f"label_key {key!r} is not among the keyword arguments")
            return args, {k: v for k, v in kwargs.items() if k != key}, kwargs[key]
        if not -len(args) <= key < len(args):
            raise ValueError(f"label_key {key} is outside the {len(args)} arguments")
        position = key % len(args)
        return args[:position] + args[position + 1 :], kwargs, args[position]


def _accuracy(y: Any, t: Any) -> Any:
    return F.accuracy(y, t)


def _report(values: dict[str, Any], link: Link) -> None:
    import branchgraph.chainer as chainer

    report = getattr(chainer, "report", None)
    if report is not None:
        report(values, link)
