"""CBOR for what nodes sign and gossip: plain values only, bounded, hostile bytes refused.

CBOR knows tags (dates, regular expressions, references to other parts); none of them is accepted,
but for one that the caller may name, of a number.
Source: RFC 8949.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import cbor2

from wetware.errors import InvalidArgument

DEPTH_MAX: Final = 8
Tag = cbor2.CBORTag
"""`Tag(tag, value)`: a tagged value."""
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_SCALARS = (bool, float, str, bytes, type(None))


def _refuse(*_: Any) -> NoReturn:
    raise ValueError("a tag")


# Those that the library knows; a tag can refer to other parts, so that few bytes are a huge tree.
_NO_TAGS: Final = dict.fromkeys((*range(512), 1004, 43000, 55799), _refuse)


@functools.cache
def _tags_but(tag: int | None) -> Mapping[int, Callable[..., Any]]:
    return _NO_TAGS if tag is None else {**_NO_TAGS, tag: lambda value, _: Tag(tag, value)}


def encode(value: Any) -> bytes:
    """The bytes of a plain value, in which there may be a Tag of a plain value."""
    return cbor2.dumps(value)


def items(data: bytes, most: int) -> int:
    """How many items the CBOR seems to have, up to `most` + 1; cheap, and checks nothing."""
    at = count = 0
    while at < len(data) and count <= most:
        head, at, count = data[at], at + 1, count + 1
        short = head & 31
        if 24 <= short < 28:
            size = 1 << (short - 24)
            short, at = int.from_bytes(data[at : at + size], "big"), at + size
        if head >> 5 in (2, 3):  # bytes, text
            at += short
    return count


def decode(
    data: bytes, *, bytes_max: int, tag: int | None = None, depth_max: int = DEPTH_MAX
) -> Any:
    """The plain value that `data` is the whole encoding of.

    None, bool, 64-bit int, float, str, bytes, list and dict with str keys, at most `depth_max`
    deep, and `Tag`s of an int where `tag` names one.
    Raises InvalidArgument for anything else.
    """
    if len(data) > bytes_max:
        raise InvalidArgument(f"{len(data)} bytes of CBOR where at most {bytes_max} are expected")
    source = io.BytesIO(data)
    try:
        value = cbor2.CBORDecoder(
            source,
            tag_hook=_refuse,
            semantic_decoders=_tags_but(tag),
            max_depth=depth_max,
            allow_indefinite=False,
            allow_duplicate_keys=False,
        ).decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise InvalidArgument(f"not CBOR: {str(exc)[:120]}") from None
    if source.tell() != len(data):
        raise InvalidArgument("bytes after the end of the CBOR")
    _check(value)
    return value


def untagged(value: Any, meant: Callable[[int], Any]) -> Any:
    """What was decoded, with what `meant` gives for its number in the place of each Tag."""
    if isinstance(value, Tag):
        return meant(value.value)
    if isinstance(value, dict):
        return {key: untagged(each, meant) for key, each in value.items()}
    if isinstance(value, list):
        return [untagged(each, meant) for each in value]
    return value


def _check(value: Any) -> None:
    """Refuse what only a tag or a simple value can make; the decoder has bounded the depth."""
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is int:
        if not _INT_MIN <= value <= _INT_MAX:
            raise InvalidArgument("a CBOR integer of more than 64 bits")
    elif kind is Tag:
        if type(value.value) is not int:
            raise InvalidArgument("a CBOR tag of something else than a number")
    elif kind is list:
        for item in value:
            _check(item)
    elif kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise InvalidArgument("a CBOR map with a key that is not text")
            _check(item)
    else:
        raise InvalidArgument(f"CBOR of a kind that is not used here ({kind.__name__})")
