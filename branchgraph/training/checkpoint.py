"""Checkpoints: the file of a network that also holds what its training needs to go on.

A checkpoint is a `.bg` file like any other: it draws, sweeps and evaluates. Beside the network's
own states it declares those of the run (optimiser slots, step counts, the key and step of the
random streams), which no node of the network reads, and its metadata say where the run stands and
how it was asked for. So nothing is lost between one step and the next:

    save_checkpoint("net.bg", graph, training, progress, recipe)
    checkpoint = load_checkpoint("net.bg")
    training = checkpoint.resume(optimiser)          # bit for bit where it was
    train(training, ..., progress=checkpoint.progress)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from branchgraph.ir.attributes import field_types, normalise
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.file import load, read_notes, save
from branchgraph.ir.graph import Graph
from branchgraph.ir.optimisers import Optimiser
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State, Store
from branchgraph.training.history import History, Progress
from branchgraph.training.loop import Training

#: Roles of states that a run adds to those of its network.
_OF_RUNS = frozenset({Role.SLOT, Role.STEP, Role.KEY})
#: The entry of a file's notes that makes it a checkpoint.
NOTE = "training"


@dataclass(frozen=True)
class Recipe:
    """How a run was asked for: what has to be the same again when it goes on."""

    data: str = ""
    examples: int = 0
    optimiser: str = ""
    weight_decay: float = 0.0
    batch: int = 0
    seed: int = 0
    epochs: int = 0
    inputs: dict[str, float] = field(default_factory=dict)
    validate: bool = False
    backend: str = "numpy"


@dataclass(frozen=True)
class Checkpoint:
    """A network as declared, the values of all states, and where its training stands."""

    graph: Graph
    store: Store
    progress: Progress
    recipe: Recipe
    #: States of the run that the network does not have.
    extra: tuple[State, ...]

    def resume(self, optimiser: Optimiser, *, backend: str | None = None) -> Training:
        """The training as it was: states, slots, step counts and random streams.

        `optimiser` must be the rule of the run; `GraphError` names the states that do not fit.
        """
        training = Training.of(
            self.graph, optimiser, backend=backend or self.recipe.backend, store=self.store
        )
        saved = dict(_occurrences(self.extra))
        for key, state in _occurrences(_extra(self.graph, training)):
            if key not in saved or saved[key].type != state.type:
                raise GraphError(
                    f"the checkpoint has no state {state.name} {state.type}, which the optimiser "
                    "needs; resume with the optimiser that it was saved with"
                )
            training.store[state] = self.store[saved[key]]
        return training


def save_checkpoint(
    path: str | os.PathLike[str], graph: Graph, training: Training, progress: Progress,
    recipe: Recipe | None = None,
) -> None:  # fmt: skip
    """Write the declared `graph` and everything about its training, whole or not at all.

    Raises what `branchgraph.ir.file.save` raises; the old file is untouched then.
    """
    whole = clone(graph)
    for state in _extra(graph, training):
        whole.read(state)
    note = {
        "epochs": progress.history.epochs,
        "seconds": progress.history.seconds,
        "step": progress.step,
        "sums": progress.sums,
        "step_seconds": progress.seconds,
        "recipe": dataclasses.asdict(recipe or Recipe()),
    }
    save(path, whole, training.store, notes={NOTE: json.dumps(note)})


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`; `FormatError` when it is a network without a training run."""
    note = read_training(path)
    if note is None:
        raise FormatError(
            f"{os.fspath(path)}: a network, but no checkpoint: it does not say where its training "
            "stands; train it with: branchgraph train FILE -o NEW.bg"
        )
    progress, recipe = note
    whole, store = load(path)
    idle = {s for s, value in whole.reads.items() if not value.users and s.role in _OF_RUNS}
    graph = clone(whole)
    graph.keep(read=lambda state: state not in idle)
    return Checkpoint(graph, store, progress, recipe, tuple(s for s in whole.states if s in idle))


def read_training(path: str | os.PathLike[str]) -> tuple[Progress, Recipe] | None:
    """Where the training of the file at `path` stands, or None if the file does not say."""
    text = read_notes(path).get(NOTE)
    if text is None:
        return None
    try:
        return _parsed(json.loads(text))
    except (ValueError, TypeError, KeyError, GraphError, RecursionError) as error:
        raise FormatError(
            f"{os.fspath(path)}: what it says of its training cannot be read ({error}); "
            "use another checkpoint, or train from the start"
        ) from None


# -- states of the run -----------------------------------------------------------------------------


def _extra(graph: Graph, training: Training) -> list[State]:
    """States of the training step that the network itself does not have, in their order."""
    own = set(graph.states)
    return [s for s in training.step.states if s not in own]


def _occurrences(states: Iterable[State]) -> Iterator[tuple[tuple[str, int], State]]:
    """Each state under its name and how often the name came before."""
    seen: dict[str, int] = {}
    for state in states:
        number = seen.get(state.name, 0)
        seen[state.name] = number + 1
        yield (state.name, number), state


# -- the note --------------------------------------------------------------------------------------


def _parsed(note: Mapping[str, Any]) -> tuple[Progress, Recipe]:
    epochs = [_numbers(epoch, "epochs") for epoch in _list(note["epochs"], "epochs")]
    seconds = [_number(s, "seconds") for s in _list(note["seconds"], "seconds")]
    if len(epochs) != len(seconds):
        raise ValueError(f"{len(epochs)} epochs in {len(seconds)} times")
    step = normalise(note["step"], int, "step")
    if step < 0:
        raise ValueError(f"step {step}")
    sums = _numbers(note["sums"], "sums")
    progress = Progress(
        History(epochs, seconds), step, sums, _number(note["step_seconds"], "step_seconds")
    )
    return progress, _recipe(note["recipe"])


def _recipe(raw: Mapping[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    for name, annotation in field_types(Recipe).items():
        if name == "inputs":
            values[name] = _numbers(raw[name], name)
        else:
            values[name] = normalise(raw[name], annotation, name)
    return Recipe(**values)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{what}: expected a list")
    return value


def _number(value: Any, what: str) -> float:
    return float(normalise(value, float, what))


def _numbers(value: Any, what: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"{what}: expected numbers by name")
    return {name: _number(number, f"{what}: {name}") for name, number in value.items()}
