"""Comparing and extracting: from options to sums and results."""
