"""Reading and streaming safetensors files."""
