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
from typing import TYPE_CHECKING, Any, Final, Protocol

import capnp

from wetware.errors import InvalidArgument, LimitExceeded
from wetware.rpc.names import snake

if TYPE_CHECKING:
    from wetware.rpc.servant import Guard

LIST_ITEMS_MAX: Final = 1 << 16
"""Items of one list: a million bits fit a small message, and cost 8 MB as a Python list."""
PARTS_MAX: Final = 1 << 17
"""Items of all lists of one message, and structs whose type contains itself: pointers may lead to
one place again and again, so that a few kilobytes would be millions of values."""

_NO_UNION: Final = 0xFFFF
_WORD_BYTES: Final = 8

_INTEGERS: Final = {
    f"{sign}{bits}": (0 if sign == "uint" else -(1 << bits - 1), (1 << bits - (sign == "int")) - 1)
    for sign in ("int", "uint")
    for bits in (8, 16, 32, 64)
}


class Crossing(Protocol):
    """What turns capabilities into references and back: one end of a connection.

    Attributes:
        parts_left: How much of PARTS_MAX the message that is being read may still take.
    """

    parts_left: int

    def take(self, client: Any, interface: Any, guard: Guard | None) -> Any:
        """Register a pycapnp client and return a Ref; None for a null capability."""

    def give(self, value: Any, interface: Any, guard: Guard | None) -> Any:
        """A pycapnp client for a Servant, a guarded servant or a Ref."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the closest of `names`, or lists them."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "it takes none"


# --- checks: value → what pycapnp's setter takes
# ---------------------------------------------------


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


def _take_parts(crossing: Crossing, count: int) -> None:
    crossing.parts_left -= count
    if crossing.parts_left < 0:
        raise LimitExceeded(f"a message of more than {PARTS_MAX} items of lists")


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


def _check_integer(kind: str) -> Callable[[object], int]:
    low, high = _INTEGERS[kind]

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


def _check_enum(names: frozenset[str]) -> Callable[[object], str]:
    def check(value: object) -> str:
        if isinstance(value, str) and value in names:
            return str(value)
        if isinstance(value, str):
            raise BadValue(f"{value!r} is not a member", hint=nearest(value, sorted(names)))
        raise expected("str", value)

    return check


_CHECKS: Final[dict[str, Callable[[object], object]]] = {
    "bool": _check_bool,
    "float32": _check_float,
    "float64": _check_float,
    "text": _check_text,
    "data": _check_data,
    "void": _check_void,
    **{kind: _check_integer(kind) for kind in _INTEGERS},
}


def _bytes_of(value: object) -> int:
    """What a plain value adds to a message, at most; scalars live in the struct itself."""
    if type(value) is bytes:
        return len(value) + _WORD_BYTES
    if type(value) is str:
        return (len(value) if value.isascii() else len(value.encode())) + _WORD_BYTES
    return 0


# --- types
# ------------------------------------------------------------------------------------------


class Type:
    """One schema type.

    Attributes:
        check: Validates a value that pycapnp's `_set` takes; None where `store` does it.
        load: Turns what pycapnp read into a plain value; None where that is plain already.
        store: Puts a value: (holder, key, value, crossing, guard), where holder is a struct or list
            builder and key a field's name or an index.
        holds_caps: A value may hold capabilities.
    """

    __slots__ = ("check", "holds_caps", "load", "store")

    def __init__(
        self,
        *,
        check: Callable[[Any], Any] | None = None,
        load: Callable[[Any, Crossing, Guard | None], Any] | None = None,
        store: Callable[[Any, Any, Any, Crossing, Guard | None], None] | None = None,
        holds_caps: bool = False,
    ) -> None:
        self.check = check
        self.load = load
        self.store = store
        self.holds_caps = holds_caps


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
            known = self._structs[type_id] = Struct(self, schema)
        return known

    def of(self, proto: Any, schema: Callable[[], Any]) -> Type:
        """The type that the schema node `proto` describes; `schema` gives what it refers to."""
        kind = proto.which()
        if (check := _CHECKS.get(kind)) is not None:
            return Type(check=check)
        match kind:
            case "enum":
                return self._enum(schema())
            case "struct":
                return self._struct(schema())
            case "interface":
                return self._capability(schema())
            case "list":
                return self._list(proto.list.elementType, schema())
            case _:
                return self._any()

    def _enum(self, schema: Any) -> Type:
        def load(value: Any, _crossing: Crossing, _guard: Guard | None) -> str:
            try:
                return value._as_str()
            except (capnp.KjException, RuntimeError):  # a member that our schema does not know yet
                return f"unknown:{value.raw}"

        return Type(check=_check_enum(frozenset(schema.enumerants)), load=load)

    def _struct(self, schema: Any) -> Type:
        codec = self.struct(schema)

        def store(
            holder: Any, key: Any, value: Any, crossing: Crossing, guard: Guard | None
        ) -> None:
            if not isinstance(value, Mapping):
                raise expected("dict", value)
            # A list's structs exist already; a field's struct has to be made.
            inner = holder.init(key) if isinstance(key, str) else holder._get(key)
            codec.store(inner, value, crossing, guard)

        return Type(load=codec.load, store=store, holds_caps=True)

    def _capability(self, schema: Any) -> Type:
        interface_of = self.interface_of

        def load(value: Any, crossing: Crossing, guard: Guard | None) -> Any:
            return crossing.take(value, interface_of(schema), guard)

        def store(
            holder: Any, key: Any, value: Any, crossing: Crossing, guard: Guard | None
        ) -> None:
            if value is not None:
                client = crossing.give(value, interface_of(schema), guard)
                holder._set(key, client.cast_as(schema))

        return Type(load=load, store=store, holds_caps=True)

    def _any(self) -> Type:
        any_cap = self._any_cap

        def load(value: Any, crossing: Crossing, guard: Guard | None) -> Any:
            try:
                client = value.as_interface(any_cap)
            except capnp.KjException:  # data of an unknown type: not something we pass on
                return None
            return crossing.take(client, None, guard)

        def store(
            holder: Any, key: Any, value: Any, crossing: Crossing, guard: Guard | None
        ) -> None:
            if value is not None:
                holder._set(key, crossing.give(value, None, guard).cast_as(any_cap))

        return Type(load=load, store=store, holds_caps=True)

    def _list(self, element_proto: Any, schema: Any) -> Type:
        element = self.of(element_proto, lambda: schema.elementType)
        load_item, store_item, check_item = element.load, element.store, element.check

        def load(value: Any, crossing: Crossing, guard: Guard | None) -> list[Any]:
            count, get = len(value), value._get
            if count > LIST_ITEMS_MAX:
                raise LimitExceeded(f"a list of {count} items: more than {LIST_ITEMS_MAX}")
            _take_parts(crossing, count)
            if load_item is None:
                return [get(i) for i in range(count)]
            return [load_item(get(i), crossing, guard) for i in range(count)]

        def store(
            holder: Any, key: Any, value: Any, crossing: Crossing, guard: Guard | None
        ) -> None:
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
                    store_item(builder, i, item, crossing, guard)
            except BadValue as exc:
                exc.path.insert(0, f"[{i}]")
                raise

        return Type(load=load, store=store, holds_caps=element.holds_caps)


class Field:
    """One field of a struct."""

    __slots__ = ("check", "holds_caps", "load", "name", "nullable", "store", "union", "wire")

    def __init__(self, wire: str, kind: Type, *, union: bool, nullable: bool) -> None:
        self.wire = wire
        self.name = snake(wire)
        self.check = kind.check
        self.load = kind.load
        self.store = kind.store
        self.holds_caps = kind.holds_caps
        self.union = union
        self.nullable = nullable


_POINTERS_THAT_MAY_BE_NULL: Final = frozenset({"interface", "anyPointer"})


class Struct:
    """The codec of one struct type. Fields are reflected on at first use: types may recurse."""

    def __init__(self, types: Types, schema: Any) -> None:
        self._types = types
        self._schema = schema
        self._fields: dict[str, Field] | None = None
        self._by_wire: dict[str, Field] = {}
        self._always: tuple[Field, ...] = ()
        self._plain: tuple[tuple[str, str], ...] | None = None
        self._has_union = False

    @property
    def fields(self) -> dict[str, Field]:
        """By Python name, in the order of the schema."""
        return self._fields if self._fields is not None else self._reflect()

    @property
    def flat(self) -> bool:
        """Scalars, Text, Data and enums only, no union: pycapnp's own setter takes them all."""
        return all(f.store is None and not f.union for f in self.fields.values())

    def _reflect(self) -> dict[str, Field]:
        schema = self._schema
        fields: dict[str, Field] = {}
        by_order = sorted(schema.fields.items(), key=lambda item: item[1].proto.codeOrder)
        for wire, raw in by_order:
            proto = raw.proto
            union = proto.discriminantValue != _NO_UNION
            if proto.which() == "group":
                codec = self._types.struct(raw.schema)
                kind, nullable = (
                    Type(load=codec.load, store=_store_group(codec), holds_caps=True),
                    False,
                )
            else:
                slot_type = proto.slot.type
                kind = self._types.of(slot_type, functools.partial(getattr, raw, "schema"))
                which = slot_type.which()
                nullable = which in _POINTERS_THAT_MAY_BE_NULL or (
                    which == "struct" and _reaches(raw.schema, int(raw.schema.node.id))
                )
            field = Field(wire, kind, union=union, nullable=nullable)
            if (other := fields.get(field.name)) is not None:
                raise InvalidArgument(f"{wire} and {other.wire} have the same name in Python")
            fields[field.name] = field
        self._by_wire = {f.wire: f for f in fields.values()}
        self._always = tuple(f for f in fields.values() if not f.union)
        self._has_union = any(f.union for f in fields.values())
        if not self._has_union and all(f.load is None and not f.nullable for f in self._always):
            self._plain = tuple((f.name, f.wire) for f in self._always)
        self._fields = fields
        return fields

    def read(self, reader: Any, crossing: Crossing, guard: Guard | None) -> dict[str, Any]:
        """All of a message's parameters or results; see `load`."""
        crossing.parts_left = PARTS_MAX
        return self.load(reader, crossing, guard)

    def load(self, reader: Any, crossing: Crossing, guard: Guard | None) -> dict[str, Any]:
        """A struct reader as a dict. Each field is read once: reads count against a limit."""
        if self._fields is None:
            self._reflect()
        get = reader._get
        if self._plain is not None:
            return {name: get(wire) for name, wire in self._plain}
        out: dict[str, Any] = {}
        for field in self._always:
            out[field.name] = self._load_field(field, reader, crossing, guard)
        if self._has_union:
            try:
                wire = reader._which_str()
            except capnp.KjException:  # a member that this side's schema does not know yet
                return out
            field = self._by_wire[wire]
            out[field.name] = self._load_field(field, reader, crossing, guard)
        return out

    @staticmethod
    def _load_field(field: Field, reader: Any, crossing: Crossing, guard: Guard | None) -> Any:
        if field.nullable:
            if not reader._has(field.wire):
                return None
            _take_parts(crossing, 1)
        value = reader._get(field.wire)
        return value if field.load is None else field.load(value, crossing, guard)

    def store(
        self, builder: Any, values: Mapping[str, Any], crossing: Crossing, guard: Guard | None
    ) -> None:
        """Fill a struct builder; raises BadValue, LimitExceeded, or what `crossing.give` raises."""
        fields, member = self.fields, ""
        for name, value in values.items():
            field = fields.get(name)
            if field is None:
                raise BadValue(f"no field {name!r}", nearest(name, fields))
            if field.union:
                if member:
                    raise BadValue(f"{member!r} and {name!r} are members of one union: set one")
                member = name
            try:
                if field.check is not None:
                    builder._set(field.wire, field.check(value))
                elif value is not None or not field.nullable:
                    assert field.store is not None  # noqa: S101  # a field has one of the two
                    field.store(builder, field.wire, value, crossing, guard)
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
                out[field.wire] = checked = field.check(value)  # type: ignore[misc]  # flat: all have one
            except BadValue as exc:
                exc.path.insert(0, f".{name}")
                raise
            size += _bytes_of(checked)
        return out, size


def _store_group(codec: Struct) -> Callable[[Any, Any, Any, Crossing, Guard | None], None]:
    def store(holder: Any, key: Any, value: Any, crossing: Crossing, guard: Guard | None) -> None:
        if not isinstance(value, Mapping):
            raise expected("dict", value)
        codec.store(holder.init(key), value, crossing, guard)

    return store


def _reaches(schema: Any, target: int, seen: set[int] | None = None) -> bool:
    """Whether a struct of type `target` can be found inside `schema` by following struct fields."""
    seen = set() if seen is None else seen
    for raw in schema.fields.values():
        proto = raw.proto
        if proto.which() != "group" and proto.slot.type.which() != "struct":
            continue
        inner = raw.schema
        inner_id = int(inner.node.id)
        if inner_id == target:
            return True
        if inner_id not in seen:
            seen.add(inner_id)
            if _reaches(inner, target, seen):
                return True
    return False
