"""The TensorRT-LLM checkpoint: its names, shapes and shards, its config.json, a writer and a reader."""
