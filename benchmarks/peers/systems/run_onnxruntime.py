"""ONNX Runtime's CPU provider, all optimisations; NumPy arrays in and out."""

from __future__ import annotations

import onnxruntime


def prepare(meta):  # type: ignore[no-untyped-def]
    onnxruntime.set_default_logger_severity(3)


def load(bundle):  # type: ignore[no-untyped-def]
    return Inference(bundle)


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        path = bundle.folder / "model.onnx"
        bundle.require(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = bundle.meta["threads"]
        options.inter_op_num_threads = 1
        # Threads that spin after a run would take the cores from the system measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers)
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.result = None

    def step(self) -> None:
        self.result = self.session.run(None, self.inputs)

    def outputs(self):  # type: ignore[no-untyped-def]
        return self.result
