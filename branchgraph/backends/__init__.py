"""Where programs run. Backends are reached through `branchgraph.compiler.backend`."""
