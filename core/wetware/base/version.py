"""The version of this wetware."""

__version__ = "0.1.0"
