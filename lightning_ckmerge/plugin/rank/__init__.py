"""One rank's part of the model, the buffer and the adapters."""
