"""No example has a time limit of its own: that depends on what else the machine does."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("wetware", deadline=None)
settings.load_profile("wetware")
