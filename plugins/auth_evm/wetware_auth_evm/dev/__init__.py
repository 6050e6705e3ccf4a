"""The try-out: a chain of its own on this machine, with the contract on it."""
