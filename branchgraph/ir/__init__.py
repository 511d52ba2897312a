"""What a network is: graph, states, ops, text, gradient, optimiser rules, cost, verifier.

This package imports nothing else of branchgraph.
"""

import branchgraph.ir.ops  # noqa: F401  (registers all ops)
