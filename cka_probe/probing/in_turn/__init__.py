"""Comparisons within a memory limit: networks that do not fit together run in turn."""
