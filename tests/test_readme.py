"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from branchgraph.cli import main

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()


def test_the_code_of_the_first_screen_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 16
    names: dict[str, object] = {}
    exec(code, names)
    answers = names["answers"]
    assert isinstance(answers, dict)
    accuracy = (answers["logits"].argmax(axis=1) == names["digits"].test_labels).mean()  # type: ignore[attr-defined]
    assert accuracy > 0.8
    assert set(np.unique(answers["exit"])) == {0, 1}


def test_there_are_two_commands_and_no_other_set_up() -> None:
    assert re.findall(r"```bash\n(.*?)```", README, re.DOTALL) == [
        "python -m pip install '.[demo]' && branchgraph demo\n",
        "python -m pip install -e '.[test]' && python -m pytest\n",
    ]


def test_every_command_and_option_that_is_named_exists() -> None:
    lines = re.findall(r"`branchgraph ([a-z]+)([^`]*)`", README)
    assert {command for command, _ in lines} >= {"show", "train", "sweep", "nets", "passes"}
    for command, rest in lines:
        help_text = CliRunner().invoke(main, [command, "--help"])
        assert help_text.exit_code == 0, command
        for option in re.findall(r"(?<!\S)(--?[a-z]+)", rest):
            assert option in help_text.output, f"{command} {option}"


@pytest.mark.parametrize("row", ["show b_resnet:blocks=18 -o", "show lenet --pass"])
def test_the_drawing_commands_run_as_they_stand(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(rf"`branchgraph ({row}[^`]*)`", README)
    assert CliRunner().invoke(main, command.split()).exit_code == 0
    assert list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/networks.md"]
)
def test_links_and_pictures_exist(page: str) -> None:
    text = (TOP / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((TOP / page).parent / target).exists(), target


def test_the_names_of_the_chainer_paragraph_exist() -> None:
    import branchgraph.chainer as chainer

    for name in ("Variable", "Chain", "functions", "links", "optimizers", "serializers", "trace"):
        assert hasattr(chainer, name)
        assert f"`{name}`" in README or f"chainer.{name}" in README


def test_files_that_the_docs_name_exist() -> None:
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        for name in re.findall(
            r"`((?:ir|passes|tests|tools|compiler|nets)/[\w/]+\.py)`", (TOP / page).read_text()
        ):
            inside = TOP / "branchgraph" / name
            assert inside.exists() or (TOP / name).exists(), name
