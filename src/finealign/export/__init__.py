"""Export of an adapted model for other libraries: an open_clip folder, a transformers folder, or one ONNX file."""
