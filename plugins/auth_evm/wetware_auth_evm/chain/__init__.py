"""The chain: endpoints, the contract's events, and the state that follows from them."""
