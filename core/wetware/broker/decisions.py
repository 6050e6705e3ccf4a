"""What is kept of the latest denials: `ww why ID` shows the steps that decided one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

DECISIONS_MAX: Final = 4096
"""Denials that are kept; the audit log has the rest."""
VALUE_CHARS_MAX: Final = 80
"""Of an argument that a step shows."""


def new_id() -> str:
    """Of a decision. It cannot be guessed: who was told it may see more."""
    return f"d-{secrets.token_hex(5)}"


def shown(args: Mapping[str, object], names: frozenset[str]) -> str:
    """The arguments that constraints may be about, shortened; payloads are not shown."""
    parts = []
    for name in sorted(names & args.keys()):
        value = args[name]
        text = f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
        if len(text) > VALUE_CHARS_MAX:
            text = f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"
        parts.append(f"{name}={text}")
    return " ".join(parts)
