"""Softmax and sigmoid attention over tiles of keys."""
