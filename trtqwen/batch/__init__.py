"""Offline inference: a file of requests in, a file of results out, without a server."""
