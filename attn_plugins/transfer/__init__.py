"""New weights of a swapped model that learn from the model's own attention, and from its own outputs."""
