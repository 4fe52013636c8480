"""Builders of engines behind one protocol, and the engine directory they write."""
