"""A small student that may use tools before it answers."""
