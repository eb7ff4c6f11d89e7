"""Which modules attend, and what each is: read from what transformers declares, from attributes and code."""
