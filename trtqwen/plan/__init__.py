"""What a recipe will need and do, worked out before a GPU is touched."""
