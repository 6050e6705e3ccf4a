"""Logging in: what wallets and session keys sign, and how it is judged."""
