"""The command line: one module a theme, put together here.

Exit codes: 0 done; 1 looked, and it is not well (`data check`); 2 a mistake of the user, in one
line on standard error (`--debug` shows the traceback); 130 interrupted. Progress bars go to
standard error and vanish when that is no terminal; results go to standard output.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from branchgraph.cli.benching import bench
from branchgraph.cli.converting import convert
from branchgraph.cli.data import data
from branchgraph.cli.demo import demo
from branchgraph.cli.info import info
from branchgraph.cli.networks import nets, passes, show
from branchgraph.cli.sweeping import sweep
from branchgraph.cli.training import evaluate, train
from branchgraph.ir.errors import BranchgraphError


class _Commands(click.Group):
    """Turns the package's errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BranchgraphError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"branchgraph: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("branchgraph: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks of user errors too.")
@click.version_option(package_name="branchgraph")
def main(debug: bool) -> None:
    """Branchgraph: the symbolic graph compiler for multi-branch neural networks."""


for command in (show, train, evaluate, sweep, convert, bench, nets, passes, info, data, demo):
    main.add_command(command)
