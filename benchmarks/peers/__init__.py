"""The systems that `compare.py` measures branchgraph against, and how a network gets into them.

`declared.py` prepares the graph that peers take, `walker.py` writes it as a peer's own source with
that peer's table (`torch_ops.py`, `jax_ops.py`, `chainer_ops.py`, `mxnet_ops.py`; `onnx_ops.py`
makes an ONNX model), `bundle.py` is the folder that carries source, values and inputs to a process,
`server.py` that process, and `systems/` one module a system: how it loads a bundle and steps.

What runs in the process of a peer (`bundle`, `server`, `systems`) imports NumPy and the peer alone,
so that old interpreters can run it and memory is the peer's own.
"""
