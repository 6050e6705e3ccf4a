"""Blocks between members."""
