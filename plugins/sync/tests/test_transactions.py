"""What is a transaction in JSON, and what is refused."""

from __future__ import annotations

import json

import pytest

from wetware.errors import InvalidArgument
from wetware_sync.client import Compare, KeyValues, Write
from wetware_sync.engine import OPERATIONS_MAX
from wetware_sync.transactions import JSON_BYTES_MAX, parse


def test_all_that_there_is() -> None:
    compare = [
        {"key": "/a", "value": "ü"}, {"key": "/b", "hex": "00ff"}, {"key": "/c", "modified": 0},
        {"key": "/d", "created": 7}, {"key": "/e", "version": 2},
    ]  # fmt: skip
    then = [{"put": "/a", "value": ""}, {"put": "/b", "hex": "01"}, {"del": "/c"}]
    assert parse(json.dumps({"compare": compare, "then": then, "else": then[2:]})) == (
        [
            Compare("/a", value="ü".encode()),
            Compare("/b", value=b"\x00\xff"),
            Compare("/c", modified=0),
            Compare("/d", created=7),
            Compare("/e", version=2),
        ],
        [Write("/a", b""), Write("/b", b"\x01"), Write("/c", None)],
        [Write("/c", None)],
    )
    assert parse(b"{}") == ([], [], [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"), ("[]", "an object"), ("{", "no JSON"), ("[" * 100_000, "no JSON"),
        (b"\xff", "no JSON"), ('{"then": [], "then": []}', "'then' is there twice"),
        ('{"than": []}', "an object"), ('{"then": {}}', "then is a list"),
        ('{"then": [1]}', r"then\[0\] is 1"), ('{"then": [{"put": "/a"}]}', "one of value"),
        ('{"then": [{"put": "/a", "value": "1", "hex": "00"}]}', "one of value"),
        ('{"then": [{"put": "/a", "value": "1", "lease": 1}]}', "one of value"),
        ('{"then": [{"put": "/a", "value": 1}]}', "each a text"),
        ('{"then": [{"put": "/a", "hex": "0"}]}', r"then\[0\]"),
        ('{"then": [{"value": "1"}]}', "each a text"),
        ('{"then": [{"del": "/a", "value": "1"}]}', "del alone"),
        ('{"then": [{"del": "/a"}, {"del": 1}]}', r"then\[1\]"),
        ('{"compare": [{"key": "/a"}]}', "one of"), ('{"compare": [{"value": "1"}]}', "a key"),
        ('{"compare": [{"key": "/a", "modified": true}]}', "version, numbers"),
        ('{"compare": [{"key": "/a", "modified": 1.0}]}', "version, numbers"),
        ('{"compare": [{"key": "/a", "modified": -1}]}', "version, numbers"),
        ('{"compare": [{"key": "/a", "version": 18446744073709551616}]}', "version, numbers"),
        ('{"compare": [{"key": "/a", "value": "1", "modified": 1}]}', "one "),
        ('{"compare": [{"key": "/a", "lease": 1}]}', "one of"),
        (json.dumps({"then": [{"del": "/a"}] * (OPERATIONS_MAX + 1)}), "at most 128"),
        (" " * (JSON_BYTES_MAX + 1), "more than"),
    ],
    ids=lambda text: repr(text)[:40],
)  # fmt: skip
def test_what_is_none_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refused:
        parse(text)
    assert refused.value.code == "invalid.txn"


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ([], "/"), (["/a"], "/"), (["/a/b"], "/a/"), (["/a/b", "/a/b/c"], "/a/"),
        (["/a/bc", "/a/bd"], "/a/"), (["/a/./b/c"], "/a/./b/"), (["/a/b", "/c"], "/"),
    ],
)  # fmt: skip
def test_it_is_one_of_the_directory_that_its_keys_have_in_common(
    keys: list[str], prefix: str
) -> None:
    tree, cut = KeyValues(None)._tree(*keys)
    assert tree.prefix == prefix
    assert all(tree.prefix + key[cut:] == key for key in keys)


def test_what_is_no_path_is_named() -> None:
    for keys in (["sale"], ["/a", "sale"]):
        with pytest.raises(InvalidArgument, match="'sale' is no path"):
            KeyValues(None)._tree(*keys)
