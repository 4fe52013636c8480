"""TensorRT-LLM's LLM API as an engine, in 1.2.1 and what follows. Written from its sources and not run on a GPU."""
