"""Decoding states: keys in a ring, keys by block, running sums."""
