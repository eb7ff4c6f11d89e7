"""Attention of texts of which each process has a part: what is exchanged, and what is attended to then."""
