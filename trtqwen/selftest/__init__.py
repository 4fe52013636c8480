"""Compare TensorRT-LLM with the embedded engine on the bundled model."""

RESULT = "result.json"  # in the directory of the engines
