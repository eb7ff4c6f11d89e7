"""Settings from YAML, what comes with extras, versions, and places that results go to."""
