"""Recipes on transformers' Trainer, and the loading of models that they share with evaluation and comparison."""
