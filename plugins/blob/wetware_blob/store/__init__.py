"""One node's disk: blocks by the hash of their bytes, and the pins that keep them."""
