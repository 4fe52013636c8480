"""Triton: the model repository in upstream's in-flight batching contract, its python models, the server, a client."""
