"""`ww auth evm`."""
