"""Swapped models as checkpoints that transformers alone, and what builds on its configs, loads."""
