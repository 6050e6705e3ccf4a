from __future__ import annotations

from typing import Any

import pytest

from wetware.errors import InvalidArgument
from wetware.identity import Key, PeerId
from wetware.member import Member
from wetware.overlay.membership.selector import Selector


def member(peer_id: str = "12D3KooWAbcdefXYZ", **says: Any) -> Member:
    fields: dict[str, Any] = {
        "host": "db7.example",
        "name": "storage",
        "version": "0.3.1",
        "labels": {"zone": "home", "gpu": ""},
        "services": ("pubsub", "blob"),
    }
    return Member(PeerId(peer_id), **fields | says)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "zone=home",
        "zone = home , service=pubsub",
        "zone=home,service=pubsub,state=alive,host=db*",
        "zone!=office",
        "missing!=x",
        "gpu=",
        "missing=",
        "service=blo?",
        "service!=proc",
        "id=12D3*XYZ",
        "version=0.3.*",
        "name=st[oa]rage",
        "name=st[!x]rage",
        "storage",
        "db7.example",
        "db7*",
        "12D3KooWAbc",
        "defXYZ",
        "storage,state=a*",
    ],
)
def test_matches(text: str) -> None:
    assert Selector.parse(text).matches(member())


def test_a_whole_peer_id_means_that_node_and_no_other() -> None:
    peer = Key.generate().peer_id
    meant = Selector.parse(peer)
    assert meant.matches(member(peer))
    assert not meant.matches(member(name=peer))
    assert not meant.matches(member(host=peer))
    assert Selector.parse(peer[:-1]).matches(member(name=peer[:-1]))


@pytest.mark.parametrize(
    "text",
    [
        "zone=office",
        "zone!=home",
        "zone=Home",
        "zone=",
        "service=proc",
        "service!=blob",
        "state=dead",
        "state!=alive",
        "stor",  # a bare word is a whole name or host; only peer IDs may be shortened
        "db7",
        "bcdef",
        "XYZ",  # so few characters are the end of many peer IDs
        "zone=home,name=other",
    ],
)
def test_does_not_match(text: str) -> None:
    assert not Selector.parse(text).matches(member())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a=b,,c=d", "term 2"),
        ("a=b,", "term 2"),
        ("=x", "'=x'"),
        ("a b=x", "'a b=x'"),
        ("!=x", "'!=x'"),
        ("a==b", "'a==b'"),
        ("a=b=c", "'a=b=c'"),
        ("a=!b", "'a=!b'"),
        ("state=up", "'state=up'"),
        ("name=", "'name=' names no name"),
        ("id!=", "'id!=' names no id"),
        ("zone=home,host=", "'host=' names no host"),
        ("host=" + "*" * 17, "wildcards"),
        ("x" * 2000, "1024"),
        (",".join(["a=b"] * 33), "32 terms"),
    ],
)
def test_errors_name_the_term(text: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        Selector.parse(text)
    assert named in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "text", ["storage", "db7.example,zone=home", "name=storage", "id=12D3KooWA"]
)
def test_a_name_means_one_node(text: str) -> None:
    assert Selector.parse(text).names_one


@pytest.mark.parametrize("text", ["", "zone=home", "host=db7", "db*", "name=st*", "name!=storage"])
def test_what_nodes_are_alike_in_means_any_of_them(text: str) -> None:
    assert not Selector.parse(text).names_one


def test_many_wildcards_take_no_time() -> None:
    node = member(name="a" * 63)
    assert not Selector.parse("name=" + "*a" * 15 + "b").matches(node)
