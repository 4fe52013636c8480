"""The embedded executor: in-flight batching over a paged KV cache, with TensorRT-LLM's semantics and names."""
