"""From a TensorRT-LLM checkpoint back to a Hugging Face directory."""
