"""transformers' server with swapped models, and the caches of conversations held between their turns."""
