"""Distillation between any two networks: from logits, through exit branches, or from features."""
