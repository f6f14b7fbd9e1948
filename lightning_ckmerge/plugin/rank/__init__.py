"""What one rank holds of the model, the buffer and the adapters."""
