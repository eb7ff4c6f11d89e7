"""Texts from hubs and files, and the demo's model."""
