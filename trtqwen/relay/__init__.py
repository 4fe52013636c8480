"""Engines of other projects with the interface of the embedded executor."""
