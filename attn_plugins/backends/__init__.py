"""Existing kernels where one computes the same function as an attention, one a file."""
