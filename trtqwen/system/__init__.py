"""Processes, sockets and the host: code for Linux, without models."""
