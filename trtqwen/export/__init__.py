"""Export of a TensorRT-LLM checkpoint to a Hugging Face directory."""
