"""Files of tensors: one reader, one writer and one hasher of safetensors, and renames that survive a crash."""
