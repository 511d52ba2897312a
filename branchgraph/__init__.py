"""branchgraph: the symbolic graph compiler for multi-branch neural networks."""
