"""The artifacts of searches: directories of safetensors and JSON, written whole or not at all, checked before use."""
