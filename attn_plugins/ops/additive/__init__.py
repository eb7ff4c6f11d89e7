"""Additive attention: scores of tanh, and a global query."""
