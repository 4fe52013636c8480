"""From a checked request to tokens of the engine and back to text."""
