"""What a network can become: one module a pass; each docstring states the algebra it relies on."""

from branchgraph.passes import clean  # noqa: F401  (registers the passes)
