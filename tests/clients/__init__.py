"""Modules that others wrote, each trained in a virtual environment of its own, with and without the callback."""
