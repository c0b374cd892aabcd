"""The names of an export's files, which need nothing to be known."""

CARD, PARITY, CLASSES, ANCHORS = "README.md", "parity.json", "classes.json", "anchors.safetensors"
USAGE, GRAPH = "usage.py", "model.onnx"
