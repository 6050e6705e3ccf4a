"""Which nodes are meant: `zone=home,service=pubsub,host=db*`, or a bare name.

All terms must hold. A term is `KEY=PATTERN` or `KEY!=PATTERN`, where KEY is one of `id`, `host`,
`name`, `state`, `service`, `version` or else a label's key, and a pattern may have the wildcards
`*`, `?` and `[…]`; or a bare word: a peer ID, a node's name, its host, or four or more characters
from the beginning or end of its peer ID. A whole peer ID means that node and no other, whatever
others call themselves.
A node without a label has the empty value; `service!=x` means that no service of the node is `x`.
The other keys need a pattern: nothing has the empty name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.errors import InvalidArgument
from wetware.identity import PeerId

if TYPE_CHECKING:
    from wetware.member import Member

SELECTOR_CHARS_MAX: Final = 1024
TERMS_MAX: Final = 32
ID_PART_CHARS_MIN: Final = 4
"""Of the beginning or end of a peer ID, as a bare word."""
WILDCARDS_MAX: Final = 16
"""Of one pattern; matching takes time that grows with them."""
STATES: Final = ("alive", "suspect", "dead", "left")
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_NODE_KEYS: Final = frozenset(("id", "host", "name", "state", "service", "version"))
_EXAMPLE: Final = "for example zone=home,service=pubsub,host=db*"


@dataclass(frozen=True, slots=True)
class Term:
    """One condition. `key` is "" for a bare word."""

    key: str
    negated: bool
    pattern: str

    def matches(self, member: Member) -> bool:
        return self._found(member) != self.negated

    def _found(self, member: Member) -> bool:
        match self.key:
            case "":
                if _is_glob(self.pattern):
                    texts = (member.name, member.host, member.peer_id)
                    return any(self._is(text) for text in texts)
                if self.pattern in (member.name, member.host):
                    return True
                # A node called "a" is not all those whose peer ID ends in it.
                return len(self.pattern) >= ID_PART_CHARS_MIN and (
                    member.peer_id.startswith(self.pattern) or member.peer_id.endswith(self.pattern)
                )
            case "id":
                return self._is(member.peer_id)
            case "host":
                return self._is(member.host)
            case "name":
                return self._is(member.name)
            case "state":
                return self._is(member.state)
            case "version":
                return self._is(member.version)
            case "service":
                return any(self._is(service) for service in member.services)
            case label:
                return self._is(member.labels.get(label, ""))

    def _is(self, text: str) -> bool:
        return fnmatch.fnmatchcase(text, self.pattern)


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector, all of whose terms must hold; one without any matches every node."""

    terms: tuple[Term, ...]

    @property
    def names_one(self) -> bool:
        """Whether one node is meant, by its name or ID, and not any of those that are alike."""
        return any(
            term.key in ("", "name", "id") and not term.negated and not _is_glob(term.pattern)
            for term in self.terms
        )

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector; raises InvalidArgument that names the term at fault."""
        if len(text) > SELECTOR_CHARS_MAX:
            raise _bad(f"longer than {SELECTOR_CHARS_MAX} characters")
        if not text.strip():
            return cls(())
        parts = text.split(",")
        if len(parts) > TERMS_MAX:
            raise _bad(f"more than {TERMS_MAX} terms")
        return cls(tuple([_term(part.strip(), at) for at, part in enumerate(parts, 1)]))

    def matches(self, member: Member) -> bool:
        return all(term.matches(member) for term in self.terms)


def selected(selector: Selector, callback: Callable[[Member], None]) -> Callable[[Member], None]:
    """Tell of members that match, each time, and once more of one that no longer does.

    Args:
        selector: Which are meant. None that is "removed" matches.
        callback: Called on.
    """
    shown: set[PeerId] = set()

    def tell(member: Member) -> None:
        matches = member.state != "removed" and selector.matches(member)
        if matches or member.peer_id in shown:
            (shown.add if matches else shown.discard)(member.peer_id)
            callback(member)

    return tell


def _bad(what: str) -> InvalidArgument:
    return InvalidArgument(f"bad selector: {what}", hint=_EXAMPLE, code="invalid.selector")


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _term(text: str, at: int) -> Term:
    if not text:
        raise _bad(f"term {at} is empty")
    key, equals, pattern = text.partition("=")
    negated = bool(equals) and key.endswith("!")
    key, pattern = (key.removesuffix("!").strip(), pattern.strip()) if equals else ("", text)
    if equals and not _KEY.fullmatch(key):
        raise _bad(f"{key!r} in the term {text!r} is not a key")
    if "=" in pattern or "!" in pattern.replace("[!", ""):
        raise _bad(f"{pattern!r} in the term {text!r} is not a pattern")
    if not pattern and key in _NODE_KEYS:
        raise _bad(f"the term {text!r} names no {key}")
    if sum(map(pattern.count, "*?[")) > WILDCARDS_MAX:
        raise _bad(f"the term {text!r} has more than {WILDCARDS_MAX} wildcards")
    if key == "state" and not any(fnmatch.fnmatchcase(state, pattern) for state in STATES):
        raise _bad(f"{pattern!r} in the term {text!r} is none of {', '.join(STATES)}")
    if not key and is_peer_id(pattern):
        key = "id"
    return Term(key, negated, pattern)


def is_peer_id(text: str) -> bool:
    """Whether the text is a whole peer ID."""
    try:
        PeerId.parse(text)
    except InvalidArgument:
        return False
    return True
