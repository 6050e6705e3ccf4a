"""Names of topics, and what they are on the wire.

A name is a subject: tokens between dots, and in a pattern `*` for any one of them and `>` for the
rest (`wetware.base.subjects`). A name of one token has a topic of GossipSub to itself. Longer names
share one with all that begin with the same token, and so do patterns: `orders.eu.new` and
`orders.*.new` are heard on `orders.>`.
"""

from __future__ import annotations

import re
from typing import Final

from wetware.base.subjects import ONE, REST, tokens_of
from wetware.errors import InvalidArgument

ASKED: Final = "#ask"
"""What a mesh ends with on the wire that says who serves; no message is in it."""
_NAME: Final = re.compile(r"[A-Za-z0-9._~:@+-]+(/[A-Za-z0-9._~:@+-]+)*")


def is_name(name: str) -> bool:
    """Whether something can be published to it, but for its length."""
    return _NAME.fullmatch(name) is not None


def is_pattern(name: str) -> bool:
    return not {ONE, REST}.isdisjoint(name.split("."))


def mesh(name: str) -> str:
    """What is heard for a name or pattern: the name itself, or a pattern of all that share it."""
    first, dot, _ = name.partition(".")
    return f"{first}.{REST}" if dot else name


def is_shared(topic: str) -> bool:
    """Whether a mesh, without what frames end it with, is one of many names."""
    return topic.endswith(f".{REST}")


def check_topic(name: str, chars_max: int) -> str:
    """The name or pattern, if it is one; raises InvalidArgument.

    Plain ASCII, so that two names that look the same are the same.
    """
    tokens = tokens_of(name) if 0 < len(name) <= chars_max else None
    if tokens is not None:
        if tokens[0] in (ONE, REST):
            raise InvalidArgument(
                f"{name!r} begins with a wildcard: this node would have to hear every message of "
                "the cluster",
                hint="write the first token, e.g. orders.>",
                code="invalid.topic",
            )
        if is_name(".".join("x" if token in (ONE, REST) else token for token in tokens)):
            return name
    shown = name if len(name) <= 40 else f"{name[:40]}…"
    if not name:
        what = "a topic needs a name"
    elif len(name) > chars_max:
        what = f"the topic {shown!r} has {len(name)} characters; topic_chars_max is {chars_max}"
    else:
        what = f"{shown!r} is not a topic"
    raise InvalidArgument(
        what,
        hint="use letters, digits and . _ ~ : @ + -, in parts separated by single slashes; * for "
        "any token between dots, > for the last ones",
        code="invalid.topic",
    )
