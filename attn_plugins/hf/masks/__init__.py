"""Masks that transformers asks for or makes, as an AttentionMask."""
