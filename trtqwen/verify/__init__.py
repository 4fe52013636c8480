"""Compare a checkpoint with its model: where they differ, by how much, and whether that is acceptable."""
