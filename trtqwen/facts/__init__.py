"""Facts about TensorRT-LLM releases and graphics cards, each with its source."""
