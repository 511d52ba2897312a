"""What a network can become: one module a pass; each docstring states the algebra it relies on."""

from branchgraph.passes import (  # noqa: F401  (registers the passes)
    cast,
    clean,
    fold_batch_norm,
    fuse_branches,
    fuse_means,
    fuse_siblings,
    harden_gates,
    insert_exits,
    merge_and_run,
    net2net,
    prune_channels,
    prune_gates,
    share_weights,
    split_ensemble,
)
