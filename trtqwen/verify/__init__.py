"""A checkpoint run beside the model it came from: where they differ, by how much, and whether that is acceptable."""
