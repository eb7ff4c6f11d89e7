"""What is written into configs, model cards and adapters, and read from them."""
