"""vLLM as an engine: a process of its own with an environment of its own, spoken to over HTTP with token ids."""
