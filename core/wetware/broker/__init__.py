"""The capability broker: who gets which capability, and when it ends."""
