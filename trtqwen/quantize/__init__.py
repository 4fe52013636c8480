"""INT8: weight-only, SmoothQuant and KV-cache scales, calibration, and the report on what they cost."""
