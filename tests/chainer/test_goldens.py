"""The recorded Chainer cases, replayed by the script that comes with the recordings."""

from __future__ import annotations

import importlib.util
import json
import warnings
from types import ModuleType
from typing import Any

import pytest
from goldens import folder

#: Cases that belong to the later front-end issue. Nothing else may stand here.
LATER = frozenset(
    {
        "optimizers.MSVAG/0",
        "optimizers.MSVAG/4",
        "optimizers.MSVAG/5",
        "optimizers.MSVAG/6",
        "optimizers.MSVAG/7",
        "serialize/trainer",
        "graph/linear_relu",
        "graph/branches",
        "graph/styles",
    }
)
GROUPS = ("function", "link", "init", "optimizer", "network", "serialize")


@pytest.fixture(scope="module")
def replayer() -> ModuleType:
    """The script that replays cases."""
    path = folder("chainer") / "run_goldens.py"
    spec = importlib.util.spec_from_file_location("run_goldens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(group: str) -> list[dict[str, Any]]:
    manifest = json.loads((folder("chainer") / "manifest.json").read_text())
    return [c for c in manifest["cases"] if c["group"] == group and c["id"] not in LATER]


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "op by op"])
@pytest.mark.parametrize("group", GROUPS)
def test_every_recorded_case_passes(replayer: ModuleType, group: str, lazy: bool) -> None:
    import branchgraph.chainer as chainer

    lib = replayer.Lib("branchgraph.chainer")
    cache: dict[str, Any] = {}
    failures = {}
    replayed = cases(group)
    assert replayed
    for case in replayed:
        try:
            with warnings.catch_warnings(), chainer.using_config("lazy", lazy):
                warnings.simplefilter("ignore")
                messages = replayer.run_case(lib, case, str(folder("chainer")), cache)
        except Exception as error:  # a case that raises is a failure like any other
            messages = [f"{type(error).__name__}: {error}"]
        if messages:
            failures[case["id"]] = messages[:2]
    assert not failures, f"{len(failures)} of {len(replayed)}: {json.dumps(failures, indent=1)}"


def test_the_skip_list_names_recorded_cases_only() -> None:
    manifest = json.loads((folder("chainer") / "manifest.json").read_text())
    assert {c["id"] for c in manifest["cases"]} >= LATER
    assert len(manifest["cases"]) - len(LATER) == 401
