"""Other programs, with the flag known to them and to processes that they start."""
