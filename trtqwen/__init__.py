"""trtqwen: from Hugging Face Qwen2.5 weights to a served TensorRT-LLM engine."""

__version__ = "0.1.0"
