"""Copies of pins at other members."""
