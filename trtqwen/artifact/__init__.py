"""The output of the build stages: finished directories of checkpoint, engine and model repository, with manifests."""
