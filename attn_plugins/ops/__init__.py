"""Functional kernels that attentions share."""
