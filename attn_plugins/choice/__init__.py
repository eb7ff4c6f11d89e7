"""Which heads and layers keep the model's own attention: scores of them, the choice, and rules that say it."""
