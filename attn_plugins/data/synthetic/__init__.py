"""Rows of tokens that tasks make themselves, from a seed alone."""
