"""One attention a file. Every module here is imported when the registry is first asked for a name."""
