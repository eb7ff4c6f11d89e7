"""States of attentions as layers of transformers' caches."""
