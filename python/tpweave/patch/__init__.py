"""Swapping the layers of existing models: a core, and one declarative table per model family."""
