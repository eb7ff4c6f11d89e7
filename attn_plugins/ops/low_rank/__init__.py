"""Attention through fewer keys: landmarks and projections."""
