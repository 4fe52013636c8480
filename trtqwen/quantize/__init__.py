"""INT8: weight-only, SmoothQuant, KV cache scales and calibration."""
