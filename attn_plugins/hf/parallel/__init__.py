"""Heads, sequences and weights that are spread over processes."""
