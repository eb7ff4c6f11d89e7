"""Attentions measured: alone, in generation and in models; what is kept of it, and reports."""
