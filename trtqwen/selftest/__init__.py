"""Compare TensorRT-LLM with the embedded engine on the bundled model."""
