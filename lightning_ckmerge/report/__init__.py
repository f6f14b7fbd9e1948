"""A manifest for people: one self-contained HTML page, and the same in Markdown."""
