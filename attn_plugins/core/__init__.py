"""The contract of an attention, with what it is handed, and the registry. Knows torch alone."""
