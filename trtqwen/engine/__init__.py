"""Builders of engines with one protocol, and the engine directory that they write."""
