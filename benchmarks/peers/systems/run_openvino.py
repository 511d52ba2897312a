"""OpenVINO's CPU device in float32, tuned for latency; NumPy arrays shared with the request."""

from __future__ import annotations

import openvino


def prepare(meta):  # type: ignore[no-untyped-def]
    """Nothing is set for the process."""


def load(bundle):  # type: ignore[no-untyped-def]
    return Inference(bundle)


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        path = bundle.folder / "model.onnx"
        bundle.require(path)
        settings = {
            "INFERENCE_NUM_THREADS": str(bundle.meta["threads"]),
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has AMX
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self.count = len(compiled.outputs)
        self.request = compiled.create_infer_request()
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.result = None

    def step(self) -> None:
        self.result = self.request.infer(self.inputs, share_inputs=True, share_outputs=True)

    def outputs(self):  # type: ignore[no-untyped-def]
        return [self.result[i].copy() for i in range(self.count)]
