"""All ops, one module a family. Importing this package registers every one of them."""

from branchgraph.ir.ops import (  # noqa: F401
    activation,
    constant,
    conv,
    deep,
    elementwise,
    exit,
    gate,
    index,
    linear,
    loss,
    math,
    merge,
    mode,
    norm,
    pool,
    random,
    reduce,
    reshape,
    rows,
)
