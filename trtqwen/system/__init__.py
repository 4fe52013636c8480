"""Processes, sockets and the host: what knows Linux and nothing of models."""
