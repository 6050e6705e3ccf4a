"""A revisioned key-value tree, and locks that are its transactions."""
