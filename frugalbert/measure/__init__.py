"""Export and measurement: ONNX and int8 files beside the Hugging Face directory, their model card, and latency."""
