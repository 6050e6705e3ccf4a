"""A node: all parts composed, and what it takes of its machine."""
