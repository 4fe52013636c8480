"""A Hugging Face model directory: config, lazily read tensors, tokenizer, stop ids and chat template."""
