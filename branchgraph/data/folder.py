"""Where data sets lie: `$BRANCHGRAPH_DATA`, else `branchgraph/data` in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "BRANCHGRAPH_DATA"


def data_folder(name: str) -> Path:
    """The folder of the data set `name`, whether or not it exists."""
    root = os.environ.get(VARIABLE)
    base = Path(root) if root else Path(platformdirs.user_cache_dir("branchgraph")) / "data"
    return base / name
