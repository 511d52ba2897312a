"""The command `sweep`, as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from builders import randomised
from click.testing import CliRunner, Result

from branchgraph.cli import main
from branchgraph.ir.file import save
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.insert_exits import InsertExits

ROWS = ("--rows", "60", "--batch", "30", "--repeats", "1")
BASE = ("--base", "0.01,0.5,1,3")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["sweep", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def saved(folder: Path, criterion: str = "entropy") -> str:
    plain = network("lenet:size=8,kernel=3,widths=4+8+16")
    inserting: Pass = InsertExits(after=("conv1", "conv2"), criterion=criterion)
    graph = inserting.apply(plain)
    path = folder / f"{criterion}.bg"
    save(path, graph, randomised(graph))
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network with two early exits."""
    return saved(tmp_path_factory.mktemp("sweep"))


def pasted(result: Result) -> str:
    """The last line, which must be an option that can be given again."""
    option, thresholds = result.stdout.strip().splitlines()[-1].split(" ")
    assert option == "--thresholds"
    return thresholds


def cells(result: Result) -> list[str]:
    return [line for line in result.output.splitlines() if line.strip().startswith("B-")]


def test_a_list_is_measured_and_its_choice_can_be_pasted(file: str) -> None:
    result = run(file, "--thresholds", "0.1+0.5,1e-5,3", *ROWS)
    assert result.exit_code == 0, result.output
    assert len(cells(result)) == 3
    assert "modelled" not in result.output
    assert "60 samples in batches of 30, median of 1" in result.output
    again = run(file, "--thresholds", pasted(result), *ROWS)
    assert again.exit_code == 0
    assert pasted(again) == pasted(result)
    assert "front chosen" in cells(again)[0]


def test_small_grids_are_measured_and_large_ones_modelled_off_the_front(file: str) -> None:
    small = run(file, "--screen", *BASE, *ROWS)
    assert len(cells(small)) == 16
    assert "modelled" not in small.output
    large = run(file, "--screen", *ROWS)
    assert "of 289 settings, decided in one pass" in large.output
    assert "exit3 0." in large.output, "the times of the exits are said"
    shown = cells(large)
    assert f"{289 - len(shown)} modelled settings more: --csv, --jsonl" in large.output
    assert all("modelled" not in line for line in shown)
    forced = run(file, "--screen", "--time", "model", *BASE, *ROWS)
    assert any("modelled" in line for line in cells(forced))
    assert small.exit_code == large.exit_code == forced.exit_code == 0


def test_both_ways_of_timing_decide_alike(file: str, tmp_path: Path) -> None:
    found = []
    for way in ("measured", "model"):
        log = tmp_path / f"{way}.jsonl"
        result = run(file, "--screen", *BASE, *ROWS, "--time", way, "--jsonl", str(log))
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found.append([(p.get("thresholds"), p["accuracy_fraction"]) for p in lines])
    assert found[0] == found[1]


def test_first_only_leaves_the_other_exits_off(file: str) -> None:
    result = run(file, "--screen", "--first-only", *BASE, *ROWS)
    assert ["3, 0" in line for line in cells(result)] == [False, False, False, True]
    assert pasted(result).endswith("+0")


@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_other_criteria_have_a_base_list_and_a_way_to_be_off(
    criterion: str, tmp_path: Path
) -> None:
    result = run(saved(tmp_path, criterion), "--screen", "--first-only", *ROWS)
    assert result.exit_code == 0, result.output
    again = run(str(tmp_path / f"{criterion}.bg"), "--thresholds", pasted(result), *ROWS)
    assert again.exit_code == 0, again.output


def test_keep_takes_thresholds_from_training_images(file: str) -> None:
    result = run(file, "--keep", "0.5+0.25", *ROWS)
    assert result.exit_code == 0, result.output
    assert "1437 training images in inference form" in result.output
    assert "stay" in result.output
    assert len(cells(result)) == 1
    first, second = (float(t) for t in pasted(result).split("+"))
    assert first > 0
    assert second > 0
    both = run(file, "--keep", "0.5", "--training-form", "--thresholds", "1,2", *ROWS)
    assert len(cells(both)) == 3
    assert cells(both)[-1].endswith("chosen")
    assert "in training form" in both.output


def test_accuracy_chooses_the_fastest_that_reaches_it(file: str) -> None:
    result = run(file, "--screen", *BASE, "--accuracy", "0", *ROWS)
    assert "chosen: the fastest with accuracy 0 or more" in result.output
    missed = run(file, "--screen", *BASE, "--accuracy", "1", *ROWS)
    assert missed.exit_code == 2
    assert len(cells(missed)) == 16, "what was measured is shown all the same"
    last = missed.output.strip().splitlines()[-1]
    assert last.startswith("branchgraph: no setting reaches accuracy 1; the best is 0.")


def test_logs_and_plots_are_written(file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {
        "--csv": "a.csv", "--reference-csv": "b.csv", "--jsonl": "c.jsonl", "--plot": "d.svg",
        "--plot-exits": "e.png", "--plot-scores": "f.pdf",
    }  # fmt: skip
    options = [w for option, name in names.items() for w in (option, str(tmp_path / name))]
    result = run(file, "--screen", *BASE, "--time", "model", *ROWS, *options)
    assert result.exit_code == 0, result.output
    for name in names.values():
        assert str(tmp_path / name) in result.output.splitlines()
        assert (tmp_path / name).stat().st_size > 0
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["baseline"] + ["point"] * 16
    (chosen,) = [line for line in lines if line.get("chosen")]
    assert chosen["thresholds"] == [float(t) for t in pasted(result).split("+")]
    assert chosen["times_are"] == "measured"
    with (tmp_path / "a.csv").open(newline="") as stream:
        assert len(list(csv.reader(stream))) == 18
    with (tmp_path / "b.csv").open(newline="") as stream:
        reference = list(csv.reader(stream))
    assert len(reference) == 2 + sum(line["times_are"] == "measured" for line in lines[1:])
    assert reference[2][4].startswith("{")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--screen", "--thresholds", "1"), "--screen makes its own list"),
        (("--base", "1"), "add --screen"),
        (("--first-only",), "add --screen"),
        (("--training-form",), "add --keep"),
        (("--keep", "0.5", "--screen"), "use one"),
        (("--keep", "0.5", "--accuracy", "0.5"), "use one"),
        (("--keep", "0.5", "--time", "model"), "leave out --time"),
        (("--keep", "half"), "share 'half' is no number"),
        (("--keep", "0"), "above 0 and at most 1, got 0"),
        (("--keep", "0.1+0.2+0.3"), "2 early exits need 2"),
        (("--accuracy", "98"), "write 0.985 for 98.5 %"),
        (("--accuracy", "nan"), "a fraction in 0..1"),
        (("--tolerance", "nan"), "--tolerance must be a number"),
        (("--thresholds", "1,,2"), "threshold '' is no number"),
        (("--thresholds", "nan"), "threshold 'nan' is no number"),
        (("--screen", "--base", "1,1+2"), "--base takes one number each"),
        (("--screen", "--base", ",".join(map(str, range(200)))), "40000 settings"),
        (("--rows", "999"), "expected test in 0..360"),
        (("--csv", "a.txt"), "end in .csv"),
        (("--jsonl", "a.json"), "end in .jsonl"),
        (("--plot-scores", "a.bmp"), "end in .svg"),
        (("--plot", "nowhere/a.svg"), "no folder"),
        (("--backend", "abacus"), "no backend 'abacus'"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_measured(
    file: str, options: tuple[str, ...], message: str
) -> None:
    result = run(file, *options)
    assert result.exit_code == 2, result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("branchgraph: ")
    assert message in last
    assert "times are" not in result.output


def test_the_examples_of_the_help_are_safe_in_a_shell() -> None:
    text = run("--help").output
    examples = [line.strip() for line in text.splitlines() if "branchgraph sweep " in line]
    assert len(examples) == 4
    for example in examples:
        assert not set(example) & set("*?[]{}<>|&;$!'\"`\\()#~"), example
