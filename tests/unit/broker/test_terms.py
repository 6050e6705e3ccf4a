"""Terms: one grammar for what a grant adds, and tests of arguments that nothing can upset."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware import rpc
from wetware.base import cbor
from wetware.broker.fences import Fence
from wetware.broker.glob import VALUE_CHARS_MAX, glob
from wetware.broker.methods import PATTERNS_MAX, patterns_of
from wetware.broker.naming import binds, check_against, constrainable, one_object
from wetware.broker.terms import Terms
from wetware.broker.values import QUOTA_MAX, Rate, parse_duration, parse_size
from wetware.broker.where import (
    KINDS,
    WHERE_CHARS_MAX,
    WHERE_MAX,
    Where,
    kinds_for,
    typed,
)
from wetware.errors import InvalidArgument
from wetware.identity import Key

SCHEMA = rpc.load(Path(__file__).with_name("terms.capnp"))
SHOP = SCHEMA.Shop
EVERY = SHOP.methods["every"]
ALL = frozenset({"*"})


def passes(text: str, value: object, method: Any = EVERY) -> bool | None:
    """What the constraint says to a value of its parameter; None: it cannot be judged."""
    where = Where.parse(text)
    test = where.compile(method)
    return None if test is None else test({where.param: value})


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "values", "canonical"),
    [
        ("topic=chat", "equals", ("chat",), "topic=chat"),
        ("topic=equals:chat", "equals", ("chat",), "topic=chat"),
        ("topic=", "equals", ("",), "topic="),
        ("topic=a=b", "equals", ("a=b",), "topic=a=b"),
        ("topic=equals:a*", "equals", ("a*",), "topic=equals:a*"),
        ("topic=equals:max:3", "equals", ("max:3",), "topic=equals:max:3"),
        ("topic=Room:1", "equals", ("Room:1",), "topic=Room:1"),
        ("data=hex:00ff", "equals", ("hex:00ff",), "data=hex:00ff"),
        ("topic=in:a,b", "in", ("a", "b"), "topic=in:a,b"),
        (r"topic=in:a\,b,\\", "in", ("a,b", "\\"), r"topic=in:a\,b,\\"),
        ("topic=prefix:chat/", "prefix", ("chat/",), "topic=prefix:chat/"),
        ("topic=glob:chat/*", "glob", ("chat/*",), "topic=glob:chat/*"),
        ("topic=subject:a.*.>", "subject", ("a.*.>",), "topic=subject:a.*.>"),
        ("data=max:1024", "max", ("1024",), "data=max:1024"),
        ("data=max:64k", "max", ("64000",), "data=max:64000"),
        ("data=max:1MiB", "max", ("1048576",), "data=max:1048576"),
        ("ratio=max:0.5", "max", ("0.5",), "ratio=max:0.5"),
        ("n=range:1..10", "range", ("1", "10"), "n=range:1..10"),
        ("n=range:-5..-1", "range", ("-5", "-1"), "n=range:-5..-1"),
        ("PubSub.join:topic=chat", "equals", ("chat",), "PubSub.join:topic=chat"),
        ("PubSub.joinAll:topicName=chat", "equals", ("chat",), "PubSub.join_all:topic_name=chat"),
        ("Outer.Inner.call:from=x", "equals", ("x",), "Outer.Inner.call:from_=x"),
    ],
)
def test_the_grammar(text: str, kind: str, values: tuple[str, ...], canonical: str) -> None:
    where = Where.parse(text)
    assert (where.kind, where.values, where.text) == (kind, values, canonical)
    assert Where.parse(where.text) == where


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a constraint"),
        ("chat", "not a constraint"),
        ("=chat", "not a constraint"),
        ("topic chat", "not a constraint"),
        ("9topic=chat", "not a constraint"),
        ("join:topic=chat", "not a constraint"),
        ("töpic=chat", "not a constraint"),
        ("topic=chat/*", "wildcard"),
        ("topic=chat?", "wildcard"),
        ("topic=[ab]", "wildcard"),
        ("topic=regex:.*x", "wildcard"),
        ("topic=regex:x", "no kind 'regex'"),
        ("topic=glop:chat", "no kind 'glop'"),
        ("topic=glob:[ab]", r"knows \* and \?"),
        ("topic=prefix:", "allows everything"),
        ("topic=in:", "1 to 256 values"),
        ("topic=in:a,,b", "1 to 256 values"),
        ("topic=in:a,", "1 to 256 values"),
        ("topic=in:a\\", "1 to 256 values"),
        ("topic=in:" + ",".join(map(str, range(257))), "1 to 256 values|characters"),
        ("data=max:", "no number"),
        ("data=max:many", "no number"),
        ("data=max:nan", "no number"),
        ("data=max:1e999", "no number"),
        ("data=max:1_000", "no number"),
        ("data=max:١", "no number"),
        ("n=range:1", "not a range"),
        ("n=range:..", "not a range"),
        ("n=range:1...2", "not a range"),
        ("n=range:2..1", "allows nothing"),
        ("topic=a\nb", "control characters"),
        ("topic=\x1b[2J", "control characters"),
        ("topic=\ud800", "control characters"),
        ("topic=" + "x" * WHERE_CHARS_MAX, "characters"),
        ("topic=in:" + r"\\" * ((WHERE_CHARS_MAX - 10) // 2) + "\\", "values"),
    ],
)
def test_what_is_no_constraint_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        Where.parse(text)
    assert caught.value.code == "invalid.where"
    assert caught.value.hint or "characters" in caught.value.message


def test_a_text_that_would_be_too_long_to_be_read_again_is_refused() -> None:
    text = "topic=hex:" + "x" * (WHERE_CHARS_MAX - 10)
    assert len(Where.parse(text).text) == WHERE_CHARS_MAX
    with pytest.raises(InvalidArgument, match="characters"):
        Where.parse("topic=" + "x:" + "y" * (WHERE_CHARS_MAX - 8) + "z")
    values = ",".join(["a"] * 200)
    longer = f"n=range:1..{'9' * 40}"
    assert Where.parse(longer).text == longer
    assert Where.parse(f"topic=in:{values}").text == f"topic=in:{values}"


@pytest.mark.parametrize("service", ["", "Bad", "a/b", "a b", "**", "x" * 65])
def test_a_services_name_is_checked(service: str) -> None:
    with pytest.raises(InvalidArgument, match="service's name"):
        Where.parse("topic=chat", service)


@pytest.mark.parametrize(
    ("text", "services", "expected"),
    [
        ("topic=chat", {"pubsub"}, ("pubsub", "topic=chat")),
        ("pubsub/topic=chat", {"pubsub", "blob"}, ("pubsub", "topic=chat")),
        ("pubsub/topic=glob:a/*", set(), ("pubsub", "topic=glob:a/*")),
        ("topic=prefix:chat/x=", {"pubsub"}, ("pubsub", "topic=prefix:chat/x=")),
        ("*/topic=chat", {"pubsub"}, ("*", "topic=chat")),
    ],
)
def test_an_option_names_the_service(
    text: str, services: set[str], expected: tuple[str, str]
) -> None:
    where = Where.parse_option(text, services)
    assert (where.service, where.text) == expected


def test_an_option_without_a_service_where_there_are_several() -> None:
    with pytest.raises(InvalidArgument, match="of which service"):
        Where.parse_option("topic=chat", {"pubsub", "blob"})


_PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=20)
_NUMBERS = st.integers(-(10**12), 10**12) | st.floats(-1e15, 1e15, allow_nan=False)


@st.composite
def constraints(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(KINDS))
    match kind:
        case "in":
            some = draw(st.lists(_PRINTABLE.filter(bool), min_size=1, max_size=5))
            value = ",".join(v.replace("\\", "\\\\").replace(",", "\\,") for v in some)
        case "max":
            value = str(draw(_NUMBERS))
        case "range":
            value = "..".join(map(str, sorted(draw(st.tuples(_NUMBERS, _NUMBERS)))))
        case "glob":
            value = draw(_PRINTABLE).replace("[", "")
        case "subject":
            value = draw(_PRINTABLE).replace("*", ".").replace(">", ".")
            value += draw(st.sampled_from(["", ".*", ".>", ".*.>"]))
        case "prefix":
            value = draw(_PRINTABLE.filter(bool))
        case _:
            value = draw(_PRINTABLE)
    method = draw(st.sampled_from(["", "A.b:", "Abc.doThis:", "A.B.class:"]))
    param = draw(st.sampled_from(["topic", "maxBytes", "from", "x_1", "HTTPCode"]))
    return f"{method}{param}={kind}:{value}"


@given(constraints())
def test_the_canonical_text_is_read_as_the_same(text: str) -> None:
    where = Where.parse(text, "pubsub")
    again = Where.parse(where.text, "pubsub")
    assert again == where
    assert again.text == where.text


@given(st.text(max_size=60) | constraints().map(lambda text: text[1:]))
def test_no_text_escapes_the_error_tree(text: str) -> None:
    try:
        where = Where.parse(text)
    except InvalidArgument:
        return
    assert Where.parse(where.text) == where


# --- judging arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "allowed", "refused"),
    [
        ("text=chat", ["chat"], ["Chat", "chat ", "", "chat\0", b"chat", None, 1]),
        ("text=", [""], ["x", None, b""]),
        ("text=in:a,b", ["a", "b"], ["", "ab", "c", ["a"]]),
        ("text=prefix:chat/", ["chat/", "chat/a"], ["chat", "Chat/a", b"chat/", "xchat/"]),
        ("text=glob:chat/*", ["chat/", "chat/a/b"], ["chat", "xchat/a", b"chat/a"]),
        ("text=max:3", ["", "abc", "ä"], ["abcd", "ää", b"abc", 3]),
        ("text=range:2..3", ["ab", "ä"], ["a", "abcd"]),
        ("data=hex:00ff", [b"\x00\xff"], [b"\x00", "hex:00ff", b"hex:00ff"]),
        ("data=abc", [b"abc"], ["abc", b"abcd", bytearray(b"abc")]),
        ("data=in:hex:00,x", [b"\x00", b"x"], [b"hex:00", b"\x01"]),
        ("data=prefix:hex:00", [b"\x00", b"\x00\x01"], [b"", b"\x01", b"hex:00"]),
        ("data=max:3", [b"", b"abc"], [b"abcd", "abc"]),
        ("count=7", [7], [8, 7.0, "7", True, None]),
        ("count=in:1,-2", [1, -2], [2, "1", True]),
        ("count=max:10", [10, -5], [11, 10.0, "1", False]),
        ("count=max:9007199254740993", [2**53 + 1], [2**53 + 2]),
        ("count=range:1..10", [1, 10], [0, 11, None]),
        ("ratio=0.5", [0.5], [0.6, "0.5"]),
        ("ratio=max:1", [1.0, -math.inf], [1.1, math.nan, math.inf, "1"]),
        ("ratio=range:0..1", [0.0, 1.0], [math.nan, -0.1]),
        ("really=true", [True], [False, 1, "true", None]),
        ("really=in:true,false", [True, False], [0, None]),
        ("colour=darkBlue", ["darkBlue"], ["red", "dark_blue", "unknown:7"]),
        ("colour=in:red,darkBlue", ["red"], ["unknown:1"]),
        ("items=max:2", [[], ["a", "b"]], [["a", "b", "c"], ("a",), "a", None]),
        ("items=range:1..2", [["a"]], [[]]),
    ],
)
def test_values_of_every_type(text: str, allowed: list[object], refused: list[object]) -> None:
    for value in allowed:
        assert passes(text, value) is True, value
    for value in refused:
        assert passes(text, value) is False, value


def test_a_missing_argument_fails() -> None:
    test = Where.parse("text=max:9").compile(EVERY)
    assert test is not None
    assert test({}) is False


@pytest.mark.parametrize(
    "text",
    [
        "count=many", "count=1.5", "count=prefix:1", "count=glob:1*", "ratio=glob:*", "really=yes",
        "really=max:1", "data=glob:*", "data=hex:0", "colour=max:3", "colour=prefix:r", "items=a",
        "items=in:a", "items=glob:*", "whole=x", "whole=max:1",
    ],
)  # fmt: skip
def test_what_does_not_fit_the_type_cannot_be_judged(text: str) -> None:
    assert Where.parse(text).compile(EVERY) is None
    with pytest.raises(InvalidArgument, match="does not fit"):
        check_against([Where.parse(text)], "shop", SHOP, ALL)


def test_a_parameter_without_the_annotation_cannot_be_judged() -> None:
    where = Where.parse("note=x")
    assert where.applies(SHOP.methods["enter"]), "it denies, rather than to leave it free"
    assert where.compile(SHOP.methods["enter"]) is None


def test_of_a_union_the_member_that_is_set_counts() -> None:
    choose = SHOP.methods["choose"]
    assert passes("name=x", "x", choose)
    test = Where.parse("name=x").compile(choose)
    assert test is not None
    assert not test({"number": 3, "from_": ""}), "the other member was set"
    assert passes("from=x", "x", choose), "a keyword of Python"


class Hostile(str):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("chat")

    def startswith(self, *args: Any) -> bool:
        return True

    def __len__(self) -> int:
        raise ValueError


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.just(Hostile("chat"))
    | st.just("\ud800")
    | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(constraints(), _ANYTHING)
def test_no_value_makes_a_test_raise(text: str, value: object) -> None:
    where = Where.parse(text.partition("=")[2].join(["x=", ""]))
    for param in EVERY.params:
        test = Where("*", "", param, where.kind, where.values).compile(EVERY)
        if test is not None:
            assert test({param: value}) in (True, False)
            assert test({param: Hostile("chat")}) is False


def test_a_lone_surrogate_has_a_length() -> None:
    assert passes("text=max:3", "\ud800") is True
    assert passes("text=max:2", "\ud800") is False


# --- globs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("", [""], ["x"]),
        ("*", ["", "x", "a/b\nc"], []),
        ("chat", ["chat"], ["chats", "Chat"]),
        ("a*a", ["aa", "aba"], ["a", "ab"]),
        ("*a*b*", ["ab", "xaxbx", "ba" * 2], ["ba", "b"]),
        ("a**b", ["ab", "axb"], ["a"]),
        ("a?c", ["abc", "a/c", "a?c"], ["ac", "abbc"]),
        ("?*", ["x", "xy"], [""]),
        ("*?a", ["xa", "aa", "baa"], ["a", ""]),
        ("a.c", ["a.c"], ["abc"]),
        ("a\\*", ["a\\b"], ["a*", "a"]),
        ("*\U0001f600", ["x\U0001f600"], ["\U0001f601"]),
    ],
)
def test_globs(pattern: str, allowed: list[str], refused: list[str]) -> None:
    matches = glob(pattern)
    assert all(matches(value) for value in allowed)
    assert not any(matches(value) for value in refused)


def _reference(pattern: str) -> re.Pattern[str]:
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c, re.escape(c)) for c in pattern), re.DOTALL)


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=10))
def test_globs_are_as_regular_expressions(pattern: str, value: str) -> None:
    assert glob(pattern)(value) is (_reference(pattern).fullmatch(value) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["*a" * 400 + "*b", "*" + "?" * 900 + "b*", "*" + "a" * 900 + "b*", "*a?" * 300, "?*" * 450],
)
def test_no_glob_takes_long(pattern: str) -> None:
    matches, value = glob(pattern), "a" * VALUE_CHARS_MAX
    started = time.perf_counter()
    for _ in range(5):
        matches(value)
    assert (time.perf_counter() - started) / 5 < 0.1
    assert not glob("*")(value + "a")


def test_no_glob_takes_long_to_make() -> None:
    """A holder chooses it, and each grant below makes it anew."""
    pattern = "?" + "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    started = time.process_time()
    for _ in range(20):
        glob(pattern)
    assert time.process_time() - started < 0.4


# --- against a schema -----------------------------------------------------------------------------


def test_a_service_is_walked_once_and_not_for_each_constraint() -> None:
    assert SHOP.reachable() is SHOP.reachable()


def test_a_constraint_on_a_method_binds_those_who_inherit_it() -> None:
    """A service may return an heir of what its schema says: then the heir's method is called."""
    room = next(found for found in SHOP.reachable() if found.name == "Room")
    knock, say = room.methods["knock"], room.methods["say"]
    assert Where.parse("Door.knock:times=max:3").applies(knock)
    assert Where.parse("Room.knock:times=max:3").applies(knock)
    assert not Where.parse("Door.knock:times=max:3").applies(say)
    assert not Where.parse("Bell.knock:times=max:3").applies(knock)


def test_what_can_be_constrained() -> None:
    found = {(method.where, param): method for method, param in constrainable(SHOP)}
    assert found[("Shop.enter", "room")].named == "room"
    assert ("Shop.enter", "age") in found
    assert ("Shop.enter", "note") not in found
    assert {where for where, _ in found} == {
        "Shop.enter", "Shop.every", "Shop.choose", "Room.say", "Room.knock", "Bell.ring",
        "Gift.open",
    }, "not of the objects that the caller makes"  # fmt: skip
    every = found[("Shop.every", "text")]
    kinds = {param: every.param_kinds[param] for where, param in found if where == every.where}
    assert kinds == {
        "text": "text", "data": "data", "count": "int", "ratio": "float", "really": "bool",
        "colour": "enum", "items": "list", "whole": "other",
    }  # fmt: skip


def test_kinds_for_a_type() -> None:
    assert kinds_for("subject") == KINDS
    assert kinds_for("text") == tuple(kind for kind in KINDS if kind != "subject")
    assert kinds_for("bool") == ("equals", "in")
    assert kinds_for("list") == ("max", "range")
    assert kinds_for("other") == ()
    for kind in ("text", "data", "int", "float", "bool", "enum", "list"):
        assert kinds_for(kind)


def check(text: str, *patterns: str, service: str = "shop") -> None:
    where = Where.parse(text, service)
    check_against([where], "shop", SHOP, frozenset(patterns or "*"))


def test_a_constraint_has_to_be_about_something_that_is_granted() -> None:
    check("room=a")
    check("Shop.enter:room=a")
    check("Shop.enter:room=a", "Shop.enter")
    check("text=max:5")
    check("nothing=x", service="other")
    for text, patterns in (
        ("nothing=x", ()),
        ("note=x", ()),
        ("Shop.nothing:room=a", ()),
        ("Nothing.enter:room=a", ()),
        ("Shop.every:room=a", ()),
        ("Visitor.shown:text=a", ()),
        ("Secret.tell:text=a", ()),
        ("room=a", ("Room.*",)),
    ):
        with pytest.raises(InvalidArgument, match="names no parameter") as caught:
            check(text, *patterns)
        assert "can" in caught.value.hint
    with pytest.raises(InvalidArgument) as caught:
        check("rooms=a", "Shop.enter")
    assert "Shop.enter:room (text)" in caught.value.hint
    assert "Bell" not in caught.value.hint


def test_a_constraint_that_is_about_no_method_is_found() -> None:
    assert binds(Where.parse("room=a"), SHOP)
    assert binds(Where.parse("note=a"), SHOP), "it denies, which is not nothing"
    assert not binds(Where.parse("rooom=a"), SHOP)
    assert not binds(Where.parse("Shop.entre:room=a"), SHOP)


def of(
    name: str, *asked: str, service: str = "Shop", mine: frozenset[str] = ALL
) -> tuple[Any, str]:
    """What `SERVICE:NAME --methods ASKED` grants."""
    methods, where = one_object("shop", SCHEMA[service], name, frozenset(asked), mine)
    assert where.service == "shop"
    return methods, where.text


ROOM = {"Room.knock", "Room.say", "Bell.ring"}


def test_one_object() -> None:
    assert of("hall") == ({"Shop.enter", *ROOM}, "room=hall")
    assert of("hall/*")[1] == "room=glob:hall/*"
    assert of("max:3")[1] == "room=equals:max:3"
    assert of("hall", "Shop.*")[0] == {"Shop.enter"}, "the rest of the shop is not one room"
    assert of("hall", "Room.say")[0] == {"Shop.enter", "Room.say"}
    assert of("hall", "Room.say", mine=frozenset({"Shop.enter", "Room.*"}))[0] == {
        "Shop.enter", "Room.say"
    }  # fmt: skip
    assert of("hall", mine=frozenset({"Shop.*", "Bell.*"}))[0] == {"Shop.enter"}


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("hall", ("Shop.serve",), "'Shop.serve' is not about one object ROOM of shop"),
        ("hall", ("Room.say", "Gift.*"), "'Gift.\\*' is not about one object"),
        ("hall", ("Bell.ring",), "has to be said how to get at Bell"),
        ("", (), "names no object"),
        ("x" * WHERE_CHARS_MAX, (), "characters"),
    ],
)
def test_what_is_no_part_of_one_object_is_refused(
    name: str, asked: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        of(name, *asked)
    with pytest.raises(InvalidArgument, match="about nothing that you have"):
        of("hall", mine=frozenset({"Room.*", "Shop.serve"}))
    with pytest.raises(InvalidArgument, match="no named objects"):
        of("x", service="Bell")


def test_names_of_a_flat_service(tmp_path: Path) -> None:
    """Each method that takes the name is held to it, and no other method is added or granted."""
    path = tmp_path / "flat.capnp"
    path.write_text(
        """@0xf4c1d7a90b3e5827;
        using Ww = import "/wetware/schema/ww.capnp";
        interface Counters {
          incr @0 (name :Text $Ww.name, by :Int64) -> ();
          get @1 (name :Text $Ww.constrained) -> (value :Int64);
          drop @2 (name :Text) -> ();
          reset @3 () -> ();
        }"""
    )
    counters = rpc.load(path).Counters
    incr, get = counters.methods["incr"], counters.methods["get"]
    named = {method.name for method, param in constrainable(counters) if param == counters.naming}
    assert named == {"incr", "get"}
    methods, where = one_object("c", counters, "a", frozenset({"Counters.get"}), ALL)
    assert methods == {"Counters.get"}
    assert where.applies(incr)
    assert where.applies(get)
    test = where.compile(get)
    assert test is not None
    assert test({"name": "a"})
    assert not test({"name": "b"})
    methods, where = one_object("c", counters, "a", frozenset(), ALL)
    assert methods == {"Counters.get", "Counters.incr"}
    with pytest.raises(InvalidArgument, match="is not about one object NAME of c"):
        one_object("c", counters, "a", frozenset({"Counters.drop"}), ALL)


def test_several_ways_to_one_object_are_not_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "ways.capnp"
    path.write_text(
        """@0xf4c1d7a90b3e5828;
        using Ww = import "/wetware/schema/ww.capnp";
        interface Jobs {
          find @0 (id :UInt32 $Ww.name) -> (job :Job);
          make @1 (id :UInt32 $Ww.name) -> (job :Job);
          dump @2 (id :UInt32 $Ww.name) -> (log :Log, text :Text);
        }
        interface Job { stop @0 () -> (); log @1 () -> (log :Log); }
        interface Log { read @0 () -> (); }"""
    )
    jobs = rpc.load(path).Jobs

    def of_job(*asked: str, name: str = "7") -> frozenset[str]:
        return one_object("jobs", jobs, name, frozenset(asked), ALL)[0]

    with pytest.raises(InvalidArgument, match="how to get at Job") as caught:
        of_job("Job.stop")
    assert "Jobs.find, Jobs.make" in caught.value.hint
    assert of_job("Job.stop", "Jobs.find") == {"Jobs.find", "Job.stop"}
    with pytest.raises(InvalidArgument, match="how to get at Log") as caught:
        of_job("Log.read")
    assert "Jobs.dump, Job.log" in caught.value.hint, "it returns a text, too: not added"
    assert of_job("Jobs.dump", "Log.read") == {"Jobs.dump", "Log.read"}
    for name in ("x", "7*"):
        with pytest.raises(InvalidArgument, match="about nothing that you have"):
            of_job(name=name)


def test_texts_as_arguments() -> None:
    assert typed("x", EVERY, "text") == "x"
    assert typed("hex:00", EVERY, "data") == b"\0"
    assert typed("7", EVERY, "count") == 7
    assert typed("true", EVERY, "really") is True
    for param, text in (("count", "x"), ("nothing", "x"), ("items", "x")):
        with pytest.raises(InvalidArgument):
            typed(text, EVERY, param)


# --- rates, durations, sizes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "per_s", "burst", "canonical"),
    [
        ("10/s", 10, 10, "10/s"),
        ("100/m", 100 / 60, 2, "100/m"),
        ("5/h", 5 / 3600, 1, "5/h"),
        ("1/d", 1 / 86400, 1, "1/d"),
        ("10/s:20", 10, 20, "10/s:20"),
        ("0.5/s", 0.5, 1, "30/m"),
        ("60/m", 1, 1, "1/s"),
        ("2.5/s:7.5", 2.5, 7.5, "150/m:7.5"),
    ],
)
def test_rates(text: str, per_s: float, burst: float, canonical: str) -> None:
    rate = Rate.parse(text)
    assert rate == Rate(per_s, burst)
    assert rate.text == canonical


@pytest.mark.parametrize(
    "text", ["", "10", "/s", "0/s", "-1/s", "10/w", "10/s:0", "10/s:0.5", "1e3/s", "9999999/s",
             "10/s:9999999", "nan/s", "١/s", "0.00001/d"],
)  # fmt: skip
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Rate.parse(text)
    assert caught.value.code == "invalid.rate"


@given(st.floats(1e-6, 1e6), st.none() | st.floats(1, 1e6))
def test_a_rates_text_is_read_as_the_same(per_s: float, burst: float | None) -> None:
    rate = Rate(per_s, burst if burst is not None else float(max(1, math.ceil(per_s))))
    assert Rate.parse(rate.text) == rate


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7d", 604_800), ("2w", 1_209_600), (" 1s ", 1)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0s", "-1s", "1y", "h", "1h30m", "nans", "9999999999d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_duration(text)
    assert caught.value.code == "invalid.duration"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("10k", 10_000), ("10K", 10_000), ("1M", 10**6), ("1MiB", 2**20), ("1.5Ki", 1536),
     ("2GB", 2 * 10**9), ("1 TiB", 2**40), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "1X", "10i", "1e3", "99999999T", "1kk"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_size(text)
    assert caught.value.code == "invalid.size"


# --- terms ----------------------------------------------------------------------------------------

FENCE = Fence.issue(Key.from_seed(bytes(32)), "lock", epoch=1, counter=7)


@st.composite
def all_terms(draw: st.DrawFn) -> Terms:
    patterns = st.frozensets(st.sampled_from(["*", "A.*", "A.b", "B.c"]))
    where = st.builds(Where.parse, constraints(), st.sampled_from(["*", "pubsub", "blob"]))
    quota = st.none() | st.integers(1, QUOTA_MAX)
    return Terms(
        services=draw(
            st.none() | st.dictionaries(st.sampled_from(["*", "pubsub", "session"]), patterns)
        ),
        where=tuple(draw(st.lists(where, max_size=3))),
        expires_at=draw(st.none() | st.floats(0, 1e10)),
        rate=draw(st.none() | st.builds(Rate, st.floats(0.001, 1e6), st.floats(1, 1e6))),
        calls=draw(quota),
        bytes=draw(quota),
        fence=draw(st.none() | st.just(FENCE)),
    )


@given(all_terms())
def test_terms_survive_storage(terms: Terms) -> None:
    plain = terms.plain()
    assert Terms.from_plain(json.loads(json.dumps(plain))) == terms
    assert Terms.from_plain(cbor.decode(cbor.encode(plain), bytes_max=1 << 20)) == terms
    assert all(isinstance(line, str) and line for line in terms.describe())


def test_terms_in_words() -> None:
    terms = Terms(
        services={"pubsub": frozenset({"Topic.publish", "PubSub.join"}), "blob": frozenset()},
        where=(Where.parse("topic=glob:chat/*", "pubsub"), Where.parse("data=max:9")),
        expires_at=1_800_000_000.0,
        rate=Rate.parse("10/s:20"),
        calls=3,
        bytes=5,
        fence=FENCE,
    )
    assert terms.describe() == [
        "blob nothing",
        "pubsub PubSub.join, Topic.publish",
        "pubsub topic=glob:chat/*",
        "data=max:9",
        "at most 10/s:20",
        "3 calls in all",
        "5 bytes in all",
        "until 2027-01-15 08:00:00 UTC",
        FENCE.describe(),
    ]
    assert Terms().describe() == []


@pytest.mark.parametrize(
    "plain",
    [
        None, [], {}, {"v": 2}, {"v": "1"}, {"v": 1, "colour": "red"},
        {"v": 1, "where": ["topic=a"]},
        {"v": 1, "where": [["pubsub", "topic=regex:a"]]}, {"v": 1, "where": [["pubsub", 7]]},
        {"v": 1, "where": 7}, {"v": 1, "where": [["pubsub", "topic=a"]] * (WHERE_MAX + 1)},
        {"v": 1, "services": {"pubsub": "*"}}, {"v": 1, "services": {"pubsub": ["A"]}},
        {"v": 1, "services": {"pubsub": [7]}}, {"v": 1, "services": {"Bad": ["*"]}},
        {"v": 1, "services": {7: ["*"]}}, {"v": 1, "services": ["pubsub"]},
        {"v": 1, "services": {"pubsub": [f"A.m{n}" for n in range(PATTERNS_MAX + 1)]}},
        {"v": 1, "services": {f"s{n}": [] for n in range(65)}},
        {"v": 1, "rate": [1]}, {"v": 1, "rate": [0, 1]}, {"v": 1, "rate": [math.nan, 1]},
        {"v": 1, "rate": "10/s"}, {"v": 1, "rate": [1, 1, 1]}, {"v": 1, "rate": [10**400, 1]},
        {"v": 1, "calls": 0}, {"v": 1, "calls": -1}, {"v": 1, "calls": "5"}, {"v": 1, "calls": 1.5},
        {"v": 1, "calls": True}, {"v": 1, "bytes": QUOTA_MAX + 1},
        {"v": 1, "expires_at": math.nan}, {"v": 1, "expires_at": math.inf},
        {"v": 1, "expires_at": "soon"}, {"v": 1, "expires_at": -1}, {"v": 1, "expires_at": True},
        {"v": 1, "fence": "00"}, {"v": 1, "fence": "zz"}, {"v": 1, "fence": b"x"},
    ],
    ids=str,
)  # fmt: skip
def test_terms_that_are_not_known_are_refused(plain: object) -> None:
    with pytest.raises(InvalidArgument):
        Terms.from_plain(plain)


@given(_ANYTHING | st.fixed_dictionaries({"v": st.just(1)}, optional={
    key: _ANYTHING for key in ("services", "where", "expires_at", "rate", "calls", "bytes", "fence")
}))  # fmt: skip
def test_no_stored_terms_escape_the_error_tree(plain: object) -> None:
    try:
        terms = Terms.from_plain(plain)
    except InvalidArgument:
        return
    assert Terms.from_plain(terms.plain()) == terms


def test_method_patterns() -> None:
    assert patterns_of({"pubsub": ["Outer.Inner.joinAll"]})["pubsub"] == {"Outer.Inner.join_all"}
    found = patterns_of({"pubsub": ["PubSub.joinAll", "Topic.*", "*"]})
    assert found == {"pubsub": frozenset({"PubSub.join_all", "Topic.*", "*"})}
    for bad in ("A", "A.", ".b", "A.b.", "a b", "A.b*", "A.b\n", "**", "A.é"):
        with pytest.raises(InvalidArgument) as caught:
            patterns_of({"pubsub": [bad]})
        assert caught.value.code == "invalid.methods"
