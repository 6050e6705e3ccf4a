"""Plain values to messages and back, with encoders and decoders made once per schema type.

Rules: struct ↔ dict (snake_case keys), list ↔ list, Text ↔ str, Data ↔ bytes, enum ↔ str,
Void ↔ None, capability → Ref, Servant or Ref → capability. Of a union the dict holds the set
member only. A struct that was not set is decoded as its defaults, or as None if its type contains
itself. A capability that was not set is None; a list has no empty places for capabilities.

Nothing here keeps a pycapnp object: a decoder returns plain values, an encoder fills a builder.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import capnp

from wetware.base.names import snake
from wetware.errors import InvalidArgument, LimitExceeded

LIST_ITEMS_MAX: Final = 1 << 16
"""Items of one list: a million bits fit a small message, and cost 8 MB as a Python list."""
PARTS_MAX: Final = 1 << 17
"""Items of all lists of one message, and structs whose type contains itself: pointers may lead to
one place again and again, so that a few kilobytes would be millions of values."""
STRUCTS_MAX: Final = 10_000
"""Types of one schema, with all that it imports."""

_NO_UNION: Final = 0xFFFF
_WORD_BYTES: Final = 8


class Crossing:
    """How the capabilities of a message pass the end of a connection, under a guard or under none.

    Attributes:
        end: Its `take(client, interface, guard)` makes a Ref of a pycapnp client, and
            `give(value, interface, guard)` a pycapnp client of a Servant, a Guarded or a Ref.
        guard: The guard.
        parts_left: How much of PARTS_MAX the message that is being read may still take.
    """

    __slots__ = ("end", "guard", "parts_left")

    def __init__(self, end: Any, guard: Any) -> None:
        self.end, self.guard, self.parts_left = end, guard, 0

    def take_parts(self, count: int) -> None:
        self.parts_left -= count
        if self.parts_left < 0:
            raise LimitExceeded(f"a message of more than {PARTS_MAX} items of lists")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the closest of `names`, or lists them."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "it takes none"


# --- checks: value → what pycapnp's setter takes --------------------------------------------------


class BadValue(Exception):
    """A value does not fit its field; `path` leads to it from the outside in."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path: list[str] = []

    def public(self, where: str) -> InvalidArgument | TypeError:
        """The error for the caller; `where` names the method."""
        return InvalidArgument(self.text(where), hint=self.hint)

    def text(self, where: str) -> str:
        return ": ".join(filter(None, (where, "".join(self.path).lstrip("."), self.message)))


class BadType(BadValue):
    """A value is of a type that its field does not take: a defect of the program that gave it."""

    def public(self, where: str) -> TypeError:
        return TypeError(self.text(where))


def expected(what: str, value: object) -> BadType:
    """The refusal of a value that is not `what`."""
    return BadType(f"expected {what}, not {type(value).__name__}")


def _check_data(value: object) -> bytes:
    if type(value) is bytes:
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise expected("bytes", value)


def _check_text(value: object) -> str:
    if isinstance(value, str):
        return value if type(value) is str else str(value)
    raise expected("str", value)


def _check_bool(value: object) -> bool:
    if value is True or value is False:
        return value
    raise expected("bool", value)


def _check_float(value: object) -> float:
    if type(value) in (float, int):
        return float(value)  # type: ignore[arg-type]  # narrowed by the test above
    raise expected("float", value)


def _check_void(value: object) -> None:
    if value is not None:
        raise expected("None", value)


def _integer_check(bits: int, *, signed: bool) -> Callable[[object], int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def check(value: object) -> int:
        if type(value) is not int:
            if isinstance(value, int) and not isinstance(value, bool):
                value = int(value)  # an IntEnum
            else:
                raise expected("int", value)
        if low <= value <= high:
            return value
        raise BadValue(f"{value} is not within {low}…{high}")

    return check


def _bytes_of(value: object) -> int:
    """What a plain value adds to a message, at most; scalars live in the struct itself."""
    if type(value) is bytes:
        return len(value) + _WORD_BYTES
    if type(value) is str:
        return (len(value) if value.isascii() else len(value.encode())) + _WORD_BYTES
    return 0


# --- types ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """One schema type.

    Attributes:
        kind: "text", "data", "int", "float", "bool", "enum", "list" or "other".
        holds: The Struct or Interface that a value is, or that a list's items are; else None.
        check: Validates a value that pycapnp's `_set` takes; None where `store` does it.
        load: Turns what pycapnp read into a plain value; None where that is plain already.
        store: Puts a value: (holder, key, value, crossing), where holder is a struct or list
            builder and key a field's name or an index.
    """

    kind: str = "other"
    holds: Any = None
    check: Callable[[Any], Any] | None = None
    load: Callable[[Any, Crossing], Any] | None = None
    store: Callable[[Any, Any, Any, Crossing], None] | None = None


_SCALARS: Final[Mapping[str, Type]] = {
    "bool": Type(kind="bool", check=_check_bool),
    "float32": Type(kind="float", check=_check_float),
    "float64": Type(kind="float", check=_check_float),
    "text": Type(kind="text", check=_check_text),
    "data": Type(kind="data", check=_check_data),
    "void": Type(check=_check_void),
    **{
        f"{sign}int{bits}": Type(kind="int", check=_integer_check(bits, signed=not sign))
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


class Types:
    """The types of one loaded schema, made on first use.

    Args:
        interface_of: Gives the Interface of a pycapnp interface schema.
        any_cap: pycapnp's schema of the interface without methods, for untyped capabilities.
    """

    def __init__(self, interface_of: Callable[[Any], Any], any_cap: Any) -> None:
        self.interface_of = interface_of
        self._any_cap = any_cap
        self._structs: dict[int, Struct] = {}

    def struct(self, schema: Any) -> Struct:
        type_id = int(schema.node.id)
        if (known := self._structs.get(type_id)) is None:
            if len(self._structs) >= STRUCTS_MAX:
                raise InvalidArgument(f"more than {STRUCTS_MAX} types")
            known = self._structs[type_id] = Struct(self, schema)
        return known

    def of(self, proto: Any, schema: Callable[[], Any]) -> Type:
        """The type that the schema node `proto` describes; `schema` gives what it refers to."""
        kind = proto.which()
        if (scalar := _SCALARS.get(kind)) is not None:
            return scalar
        match kind:
            case "enum":
                return self._enum(schema())
            case "struct":
                return self.nested(schema())
            case "interface":
                return self._capability(schema())
            case "list":
                return self._list(proto.list.elementType, schema())
            case _:
                return self._any()

    def _enum(self, schema: Any) -> Type:
        names = frozenset(schema.enumerants)

        def check(value: object) -> str:
            if not isinstance(value, str):
                raise expected("str", value)
            if value not in names:
                raise BadValue(f"{value!r} is not a member", hint=nearest(value, sorted(names)))
            return str(value)

        def load(value: Any, _crossing: Crossing) -> str:
            try:
                return value._as_str()
            except (capnp.KjException, RuntimeError):  # a member that our schema does not know yet
                return f"unknown:{value.raw}"

        return Type(kind="enum", check=check, load=load)

    def nested(self, schema: Any) -> Type:
        """The type of a struct or group within another type."""
        codec = self.struct(schema)

        def store(holder: Any, key: Any, value: Any, crossing: Crossing) -> None:
            if not isinstance(value, Mapping):
                raise expected("dict", value)
            # A list's structs exist already; a field's struct has to be made.
            codec.store(
                holder.init(key) if isinstance(key, str) else holder._get(key), value, crossing
            )

        return Type(holds=codec, load=codec.load, store=store)

    def _capability(self, schema: Any) -> Type:
        interface = self.interface_of(schema)

        def load(value: Any, crossing: Crossing) -> Any:
            return crossing.end.take(value, interface, crossing.guard)

        def store(holder: Any, key: Any, value: Any, crossing: Crossing) -> None:
            if value is not None:
                client = crossing.end.give(value, interface, crossing.guard)
                holder._set(key, client.cast_as(schema))

        return Type(holds=interface, load=load, store=store)

    def _any(self) -> Type:
        any_cap = self._any_cap

        def load(value: Any, crossing: Crossing) -> Any:
            try:
                client = value.as_interface(any_cap)
            except capnp.KjException:  # data of an unknown type: not something we pass on
                return None
            return crossing.end.take(client, None, crossing.guard)

        def store(holder: Any, key: Any, value: Any, crossing: Crossing) -> None:
            if value is not None:
                client = crossing.end.give(value, None, crossing.guard)
                holder._set(key, client.cast_as(any_cap))

        return Type(load=load, store=store)

    def _list(self, element_proto: Any, schema: Any) -> Type:
        item = self.of(element_proto, lambda: schema.elementType)
        load_item, store_item, check_item = item.load, item.store, item.check

        def load(value: Any, crossing: Crossing) -> list[Any]:
            count, get = len(value), value._get
            if count > LIST_ITEMS_MAX:
                raise LimitExceeded(f"a list of {count} items: more than {LIST_ITEMS_MAX}")
            crossing.take_parts(count)
            if load_item is None:
                return [get(i) for i in range(count)]
            return [load_item(get(i), crossing) for i in range(count)]

        def store(holder: Any, key: Any, value: Any, crossing: Crossing) -> None:
            if not isinstance(value, (list, tuple)):
                raise expected("list", value)
            if len(value) > LIST_ITEMS_MAX:
                raise LimitExceeded(f"a list of {len(value)} items: more than {LIST_ITEMS_MAX}")
            i = 0
            try:
                if check_item is not None:
                    checked = []
                    for i, item in enumerate(value):  # noqa: B007  # `i` names the bad item
                        checked.append(check_item(item))
                    holder._set(key, checked)
                    return
                assert store_item is not None  # noqa: S101  # a type has one of the two
                builder = holder.init(key, len(value))
                for i, item in enumerate(value):
                    if item is None:  # pycapnp cannot tell the reader that a place is empty
                        raise BadValue("a list has no empty places")  # noqa: TRY301
                    store_item(builder, i, item, crossing)
            except BadValue as exc:
                exc.path.insert(0, f"[{i}]")
                raise

        return Type(kind="list", holds=item.holds, load=load, store=store)


class Field:
    """One field of a struct.

    Attributes:
        wire: Its name in the schema; `name` is that in Python.
        type: What it takes.
        union: Whether it is a member of the struct's union.
        marks: The IDs of its annotations.
    """

    def __init__(self, types: Types, wire: str, raw: Any) -> None:
        proto = raw.proto
        self.wire, self.name = wire, snake(wire)
        self.union: bool = proto.discriminantValue != _NO_UNION
        self.marks = frozenset(int(annotation.id) for annotation in proto.annotations)
        if proto.which() == "group":
            self._which = "group"
            self.type = types.nested(raw.schema)
        else:
            self._which = proto.slot.type.which()
            self.type = types.of(proto.slot.type, lambda: raw.schema)

    @property
    def struct(self) -> Struct | None:
        """Of the struct or group that is within this one."""
        return self.type.holds if self._which in ("struct", "group") else None

    @functools.cached_property
    def nullable(self) -> bool:
        """Whether it can be None: a capability, or a struct whose type contains itself."""
        if self._which == "struct":
            return self.type.holds.contains_itself
        return self._which in ("interface", "anyPointer")

    def load(self, reader: Any, crossing: Crossing) -> Any:
        """Its value in a struct reader."""
        if self.nullable:
            if not reader._has(self.wire):
                return None
            crossing.take_parts(1)
        value, load = reader._get(self.wire), self.type.load
        return value if load is None else load(value, crossing)


class Struct:
    """The codec of one struct type. Fields are reflected on at first use: types may recurse."""

    def __init__(self, types: Types, schema: Any) -> None:
        self._types = types
        self._schema = schema

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """By Python name, in the order of the schema."""
        fields: dict[str, Field] = {}
        in_order = sorted(self._schema.fields.items(), key=lambda item: item[1].proto.codeOrder)
        for wire, raw in in_order:
            field = Field(self._types, wire, raw)
            if (other := fields.get(field.name)) is not None:
                raise InvalidArgument(f"{wire} and {other.wire} have the same name in Python")
            fields[field.name] = field
        return fields

    @functools.cached_property
    def contains_itself(self) -> bool:
        """Whether a struct of this type can be found inside one, by following struct fields."""
        todo, seen = [self], {self}
        while todo:
            for field in todo.pop().fields.values():
                if field.struct is self:
                    return True
                if field.struct is not None and field.struct not in seen:
                    seen.add(field.struct)
                    todo.append(field.struct)
        return False

    @functools.cached_property
    def flat(self) -> bool:
        """Scalars, Text, Data and enums only, no union: pycapnp's own setter takes them all."""
        return all(f.type.check is not None and not f.union for f in self.fields.values())

    @functools.cached_property
    def _plain(self) -> tuple[tuple[str, str], ...] | None:
        """(name, wire name) of all fields, if pycapnp reads each as what it is here."""
        fields = self.fields.values()
        if any(f.union or f.nullable or f.type.load is not None for f in fields):
            return None
        return tuple((f.name, f.wire) for f in fields)

    @functools.cached_property
    def _always(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields.values() if not f.union)

    @functools.cached_property
    def _members(self) -> dict[str, Field]:
        return {f.wire: f for f in self.fields.values() if f.union}

    def read(self, reader: Any, crossing: Crossing) -> dict[str, Any]:
        """All of a message's parameters or results; see `load`."""
        crossing.parts_left = PARTS_MAX
        return self.load(reader, crossing)

    def load(self, reader: Any, crossing: Crossing) -> dict[str, Any]:
        """A struct reader as a dict. Each field is read once: reads count against a limit."""
        if self._plain is not None:
            get = reader._get
            return {name: get(wire) for name, wire in self._plain}
        out = {field.name: field.load(reader, crossing) for field in self._always}
        if self._members:
            try:
                member = self._members[reader._which_str()]
            except capnp.KjException:  # a member that this side's schema does not know yet
                return out
            out[member.name] = member.load(reader, crossing)
        return out

    def store(self, builder: Any, values: Mapping[str, Any], crossing: Crossing) -> None:
        """Fill a struct builder; raises BadValue, LimitExceeded, or what `give` raises."""
        fields, member = self.fields, ""
        for name, value in values.items():
            field = fields.get(name)
            if field is None:
                raise BadValue(f"no field {name!r}", nearest(name, fields))
            if field.union:
                if member:
                    raise BadValue(f"{member!r} and {name!r} are members of one union: set one")
                member = name
            kind = field.type
            try:
                if kind.check is not None:
                    builder._set(field.wire, kind.check(value))
                elif value is not None or not field.nullable:
                    assert kind.store is not None  # noqa: S101  # a type has one of the two
                    kind.store(builder, field.wire, value, crossing)
            except BadValue as exc:
                exc.path.insert(0, f".{name}")
                raise

    def flatten(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """For a `flat` struct: (values by wire name, checked; bytes that they add at most)."""
        fields, out, size = self.fields, {}, 0
        for name, value in values.items():
            field = fields.get(name)
            if field is None:
                raise BadValue(f"no parameter {name!r}", nearest(name, fields))
            try:
                out[field.wire] = checked = field.type.check(value)  # type: ignore[misc]  # flat: all have one
            except BadValue as exc:
                exc.path.insert(0, f".{name}")
                raise
            size += _bytes_of(checked)
        return out, size
