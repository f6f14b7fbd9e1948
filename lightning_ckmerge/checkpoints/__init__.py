"""Other people's checkpoints: opened in several formats, merged on disk, and written for Hugging Face."""
