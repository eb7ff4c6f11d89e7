"""Pages and tables of the documentation, written from the registry and from results."""
