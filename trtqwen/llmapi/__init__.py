"""TensorRT-LLM's LLM API as an engine, from 1.2.1 on. Written from its sources and not run on a GPU."""
