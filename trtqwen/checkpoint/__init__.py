"""The TensorRT-LLM checkpoint: names, shapes and shards of its tensors, its config.json, a writer and a reader."""
