"""The web gateway in front of Triton: OpenAI's routes, admission control, limits and metrics."""
