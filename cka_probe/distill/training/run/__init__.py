"""One training run: its state, its start, its epochs and its end."""
