"""Tasks that are made, not found: one task a file, each pure in a key."""
