"""Names that the writer, the manifest and the runner agree on."""

from __future__ import annotations

OPSET = 23
CONTRIB = "com.microsoft"  # onnxruntime's own operators, version 1
NATIVE, PORTABLE = "native", "portable"  # with CONTRIB, or standard operators only
GRAPH_FILE, WEIGHTS_FILE, MANIFEST_FILE = "model.onnx", "model.safetensors", "linearize.json"
PAST, PRESENT, LOGITS = "past.", "present.", "logits"
PREFILL_PIECE = 128  # the decompositions are quadratic in the piece
