"""vLLM as an engine: a process in its own environment, with token ids over HTTP."""
