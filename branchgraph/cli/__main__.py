"""`python -m branchgraph.cli`."""

from branchgraph.cli import main

main()
