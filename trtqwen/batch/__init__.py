"""Offline inference: read a file of requests and write a file of results, without a server."""
