"""Which keys a query sees, and which tiles cover that."""
