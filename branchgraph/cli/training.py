"""Commands that train and measure: train, eval."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from branchgraph.cli.sources import check_target, pairs, read, rewritten
from branchgraph.ir.errors import BranchgraphError, FormatError

if TYPE_CHECKING:
    from branchgraph.data import Dataset
    from branchgraph.ir.graph import Graph
    from branchgraph.ir.optimisers import Optimiser
    from branchgraph.training import Recipe, Training
    from branchgraph.training.history import Progress

#: Files that curves are drawn to.
PLOT_SUFFIXES = (".svg", ".png", ".pdf")
#: What a resumed run may be given anew.
_FREE_ON_RESUME = {"resume", "epochs", "checkpoint_steps", "logs", "plot"}


@click.command()
@click.argument("net", metavar="NET", required=False)
@click.option("--data", default="digits", show_default=True, help="Data set, such as mnist.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1), help="In all.")
@click.option("--batch", default=512, show_default=True, type=click.IntRange(1))
@click.option("--optimiser", "rule", default="adam", show_default=True, help="Rule, with options.")
@click.option("--learning-rate", type=float, help="Default: the optimiser's own.")
@click.option("--weight-decay", default=0.0, type=float, help="Added to every gradient: rate * p.")
@click.option(
    "--weight", "weights", multiple=True, metavar="EXIT=W", help="Loss weight of an exit."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("--validate", is_flag=True, help="Measure the test set after every epoch.")
@click.option("--backend", default="auto", show_default=True, help="onednn, numpy or auto.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .bg file.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this checkpoint.")
@click.option(
    "--checkpoint-steps", default=0, type=click.IntRange(0), metavar="N",
    help="Save every N steps too, besides the end of each epoch.",
)  # fmt: skip
@click.option(
    "--log", "logs", multiple=True, type=click.Path(path_type=Path), help=".csv or .jsonl"
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the training curves here.")
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a network and its exits jointly, and save it.

    The output is a checkpoint from the first second on: it is written at the end of every epoch
    and when you press Ctrl-C, whole or not at all, and a run that is resumed goes on bit for bit
    where it stood.

    \b
    branchgraph train b_lenet --data mnist --epochs 10 -o b_lenet.bg
    branchgraph train lenet:size=8,kernel=3 --pass insert_exits:after=conv1 -o digits.bg
    branchgraph train b_lenet --optimiser momentum_sgd:learning_rate=0.1 --weight-decay 1e-4 \\
        --weight exit1=0.3 --log run.csv --log run.jsonl --plot curves.svg -o net.bg
    branchgraph train --resume net.bg --epochs 20
    """
    if (options["net"] is None) == (options["resume"] is None):
        raise FormatError("name a network to train, or a checkpoint with --resume (not both)")
    for log in options["logs"]:
        check_target(log, ".csv", ".jsonl")
    if options["plot"] is not None:
        check_target(options["plot"], *PLOT_SUFFIXES)
    run = _resumed(context, options) if options["resume"] else _started(options)
    run.go(options["checkpoint_steps"], options["logs"], options["plot"])


@click.command(name="eval")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True, help="Data set, such as mnist.")
@click.option("--train-set", is_flag=True, help="Measure the training set, not the test set.")
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1))
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="EXIT=T", help="Replace a threshold."
)
@click.option("--backend", default="auto", show_default=True, help="onednn, numpy or auto.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def evaluate(
    file: Path, data: str, train_set: bool, batch: int, thresholds: tuple[str, ...], backend: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure a trained network: each exit for all samples, then with early exits.

    \b
    branchgraph eval b_lenet.bg --data mnist
    branchgraph eval b_lenet.bg --data mnist --threshold exit1=0.05 --json
    """
    from branchgraph.data import load
    from branchgraph.ir.file import load as load_file
    from branchgraph.training import Evaluator, early_exits

    given = pairs(thresholds, "--threshold")
    graph, store = load_file(file)
    dataset = load(data)
    x, labels = (
        (dataset.train_images, dataset.train_labels)
        if train_set
        else (dataset.test_images, dataset.test_labels)
    )
    found: dict[str, Any] = {
        "samples": len(x), **Evaluator(graph, store, backend=backend)(x, labels, batch=batch)
    }  # fmt: skip
    if len([n for n in graph.nodes if n.op.opcode == "exit"]) > 1:
        early = early_exits(graph, store, x, labels, thresholds=given, batch=batch, backend=backend)
        found["early_exits.accuracy"] = early.accuracy
        found["early_exits.shares"] = list(early.shares)
        found["early_exits.accuracies"] = [None if math.isnan(a) else a for a in early.accuracies]
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        click.echo(f"{name}: {_figure(value)}")


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


# -- a training run --------------------------------------------------------------------------------


class _Run:
    """A network, its data and its recipe on the way to one file."""

    def __init__(
        self, graph: Graph, training: Training, progress: Progress, recipe: Recipe,
        dataset: Dataset, output: Path,
    ) -> None:  # fmt: skip
        self.graph = graph
        self.training = training
        self.progress = progress
        self.recipe = recipe
        self.dataset = dataset
        self.output = output

    def save(self) -> None:
        from branchgraph.training import save_checkpoint

        save_checkpoint(self.output, self.graph, self.training, self.progress, self.recipe)

    def go(self, every: int, logs: tuple[Path, ...], plot: Path | None) -> None:
        """Train to the last epoch, saving on the way."""
        from branchgraph.training.progress import summary

        self.save()  # what cannot be written is found now, not after the first epoch
        try:
            self._train(every, logs)
        except KeyboardInterrupt:
            self.save()
            click.echo(
                f"stopped after {self.progress.epoch} epochs and {self.progress.step} steps; go on "
                f"with: branchgraph train --resume {self.output}",
                err=True,
            )
            raise
        history = self.progress.history
        self._write_logs(logs)
        click.echo(summary(history))
        if plot is not None:
            from branchgraph.analysis.plots import plot_training

            plot_training({name: history.series(name) for name in history.names}, plot)
            click.echo(str(plot))
        click.echo(str(self.output))

    def _train(self, every: int, logs: tuple[Path, ...]) -> None:
        from branchgraph.training import Evaluator, train
        from branchgraph.training.interruption import held_interrupts
        from branchgraph.training.progress import progress_bar

        recipe, data = self.recipe, self.dataset
        x, labels = data.train_images, data.train_labels
        evaluator = Evaluator(self.graph, self.training.store, backend=recipe.backend)

        def validate() -> dict[str, float]:
            if not recipe.validate:
                return {}
            measured = evaluator(data.test_images, data.test_labels)
            return {f"test.{name}": value for name, value in measured.items()}

        with (
            progress_bar(len(x), recipe.batch, recipe.epochs, self.progress) as bar,
            held_interrupts() as check,
        ):

            def on_step(result: dict[str, float]) -> None:
                self._check_finite(result)
                if every and self.progress.step % every == 0:
                    self.save()
                bar[0](result)
                check()

            def on_epoch(epoch: int, means: dict[str, float]) -> None:
                self.save()
                self._write_logs(logs)
                bar[1](epoch, means)
                check()

            train(
                self.training, x, labels, epochs=recipe.epochs, batch=recipe.batch,
                seed=recipe.seed, progress=self.progress, on_step=on_step, on_epoch=on_epoch,
                validate=validate, **recipe.inputs,
            )  # fmt: skip

    def _check_finite(self, result: dict[str, float]) -> None:
        if not math.isfinite(result["loss"]):
            raise BranchgraphError(
                f"the loss is {result['loss']} in epoch {self.progress.epoch + 1}, step "
                f"{self.progress.step}; try a lower --learning-rate. {self.output} holds the run "
                "as it last was well"
            )

    def _write_logs(self, logs: tuple[Path, ...]) -> None:
        from branchgraph.training import write_log

        for path in logs:
            write_log(self.progress.history, path)


def _started(options: dict[str, Any]) -> _Run:
    """A run from the beginning."""
    from branchgraph.data import load
    from branchgraph.training import Progress, Recipe, Training

    output: Path | None = options["output"]
    if output is None:
        raise FormatError("name the file to save to: -o NET.bg")
    check_target(output, ".bg")
    if output.exists() and not options["overwrite"]:
        raise FormatError(
            f"{output} exists; go on with it (--resume {output}), replace it (--overwrite), or "
            "name another file"
        )
    rule = options["rule"]
    if options["learning_rate"] is not None:
        rule += f"{',' if ':' in rule else ':'}learning_rate={options['learning_rate']!r}"
    graph, store = read(options["net"])
    graph = rewritten(graph, options["passes"], store)
    made = _optimiser(rule, options["weight_decay"])
    dataset = load(options["data"])
    weights = pairs(options["weights"], "--weight")
    recipe = Recipe(
        data=options["data"],
        examples=len(dataset.train_images),
        optimiser=rule,
        weight_decay=options["weight_decay"],
        batch=options["batch"],
        seed=options["seed"],
        epochs=options["epochs"],
        inputs={f"{name}.weight": weight for name, weight in weights.items()},
        validate=options["validate"],
        backend=options["backend"],
    )
    training = Training.of(graph, made, backend=recipe.backend, store=store, seed=recipe.seed)
    return _Run(graph, training, Progress(), recipe, dataset, output)


def _resumed(context: click.Context, options: dict[str, Any]) -> _Run:
    """A run that goes on; what it was asked for comes from its checkpoint."""
    from branchgraph.data import load
    from branchgraph.training import load_checkpoint

    given = {
        name
        for name in options
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if given - _FREE_ON_RESUME:
        names = ", ".join(sorted(given - _FREE_ON_RESUME))
        raise FormatError(f"--resume takes these from the checkpoint, leave them out: {names}")
    path: Path = options["resume"]
    checkpoint = load_checkpoint(path)
    recipe = checkpoint.recipe
    if "epochs" in given:
        recipe = replace(recipe, epochs=options["epochs"])
    if checkpoint.progress.epoch >= recipe.epochs:
        raise FormatError(
            f"{path}: all {checkpoint.progress.epoch} epochs are done; train on with --epochs "
            f"{2 * checkpoint.progress.epoch}"
        )
    dataset = load(recipe.data)
    if len(dataset.train_images) != recipe.examples:
        raise FormatError(
            f"{path}: was trained on {recipe.examples} examples of {recipe.data}, there are "
            f"{len(dataset.train_images)} now; bring the same data"
        )
    training = checkpoint.resume(_optimiser(recipe.optimiser, recipe.weight_decay))
    return _Run(checkpoint.graph, training, checkpoint.progress, recipe, dataset, path)


def _optimiser(rule: str, weight_decay: float) -> Optimiser:
    from branchgraph.ir.hooks import WeightDecay
    from branchgraph.ir.optimisers import optimiser

    return optimiser(rule, (WeightDecay(weight_decay),) if weight_decay else ())
