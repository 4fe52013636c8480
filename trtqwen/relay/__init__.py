"""Engines of other projects behind the embedded executor's interface: requests in, tokens out, statistics, an end."""
