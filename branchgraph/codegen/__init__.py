"""Kernels made for one shape: LLVM assembly, compiled in this process by llvmlite.

    assembly        writes functions: values, loops, vectors, shares of threads
    engine          compiles them, and runs them on the threads of OpenMP
    objects         keeps what was compiled, for the next process

    winograd        3x3 convolutions of stride 1, and both gradients
    direct, direct_gradient     convolutions of few channels, in chains, and their gradients
    pointwise       element-wise expressions over tables of tensors
    cross_entropy   of rows of logits
    exits           criterion, decision, and the moving of rows

What is made here knows shapes and addresses only, no graph and no backend; backends put it where
their library has nothing, or something slower.
"""
