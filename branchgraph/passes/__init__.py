"""What a network can become: one module a pass; each docstring states the algebra it relies on."""

from branchgraph.passes import (  # noqa: F401  (registers the passes)
    clean,
    fold_batch_norm,
    insert_exits,
)
