"""What the build stages write: checkpoint, engine and model repository, as finished directories with a manifest."""
