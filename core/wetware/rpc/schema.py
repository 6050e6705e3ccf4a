"""Schemas, as they are reflected on: interfaces, methods, and what grants have to know of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import capnp
from capnp.lib.capnp import SchemaParser, _InterfaceModule

from wetware.base.names import snake
from wetware.errors import SchemaError
from wetware.rpc.codec import Field, Struct, Types

_CONSTRAINED_ID: Final = 0xB3C1DE9A40F7C2A5  # `constrained` in schema/ww.capnp
_NAME_ID: Final = 0xA94D2F3E6B1C7085  # `name`, likewise
_PACKED_ID: Final = 0xE1A86B0F27C4D953  # `packed`, likewise
_LENGTHS_ID: Final = 0xB7520DC93E18F64A  # `lengths`, likewise
_SUBJECT_ID: Final = 0xD3F08B6A51C9E247  # `subject`, likewise


class Method:
    """One method of an interface.

    Attributes:
        name: In snake_case.
        interface: The interface that it was found in; for an inherited method the heir.
        constrainable: Parameters on which a grant may put a predicate.
        gives: The interfaces of what it returns, if all that its caller gets of it are these
            capabilities; else empty.
        named: The parameter that names an object of the service, as `ww share SERVICE:NAME` does.
        packed: The parameter that may be several values, and that of their lengths; see `packed`.
        param_kinds: Parameter → "text", "subject", "data", "int", "float", "bool", "enum", "list"
            or "other".
        params: Names of the parameters, in the schema's order.
        results: Names of the results.
        takes: Parameter → the interface of the object that it wants.
        where: "Interface.method", for messages and logs.
        wire: The name in the schema.
    """

    def __init__(self, interface: Interface, wire: str, raw: Any, types: Types) -> None:
        self.interface = interface
        self.wire = wire
        self.name = snake(wire)
        self.where = f"{interface.name}.{self.name}"
        self.param_codec = types.struct(raw.param_type)
        self.result_codec = types.struct(raw.result_type)
        taken, given = self.param_codec.fields.values(), self.result_codec.fields.values()
        self.params = tuple(self.param_codec.fields)
        self.results = tuple(self.result_codec.fields)
        self.constrainable = frozenset(
            f.name for f in taken if f.marks & {_CONSTRAINED_ID, _NAME_ID}
        )
        self.param_kinds: Mapping[str, str] = {f.name: self._kind(f) for f in taken}
        self.takes: Mapping[str, Interface] = {f.name: f.type.holds for f in taken if _is_object(f)}
        self.named = self._named()
        self.packed = self._packed()
        bare = all(map(_is_object, given)) and not _interfaces_in(self.param_codec)
        self.gives = frozenset(_interfaces_in(self.result_codec) if bare else ())
        # The fixed part of the parameters; None where the size has to be measured.
        node = raw.param_type.node.struct
        words = node.dataWordCount + node.pointerCount
        self.param_bytes: int | None = words * 8 if self.param_codec.flat else None

    def _named(self) -> str | None:
        """The parameter with `$Ww.name`; raises SchemaError where no grant could be held to it."""
        own = self.param_codec.fields
        marked = [field for field in _fields_in(self.param_codec) if _NAME_ID in field.marks]
        for field in marked:
            if own.get(field.name) is not field:
                raise SchemaError(
                    f"{self.where} has $Ww.name on {field.name!r} within a parameter, where no "
                    "grant can be held to it",
                    hint="pass the name as a parameter of its own",
                )
            if field.type.kind in ("list", "other"):
                is_list = field.type.kind == "list"
                what = "a list" if is_list else "neither text nor data, number or enum"
                raise SchemaError(
                    f"{self.where} has $Ww.name on {field.name!r}, which is {what}: it names no "
                    "object",
                    hint="pass the name as a parameter of its own",
                )
        if len(marked) > 1:
            raise SchemaError(
                f"{self.where} has $Ww.name on {marked[0].name!r} and {marked[1].name!r}: "
                "a call is about one object",
                hint="mark the other one $Ww.constrained",
            )
        return marked[0].name if marked else None

    def _kind(self, field: Field) -> str:
        """Raises SchemaError for `$Ww.subject` on what is no text."""
        if _SUBJECT_ID not in field.marks:
            return field.type.kind
        if field.type.kind != "text":
            raise SchemaError(
                f"{self.where} has $Ww.subject on {field.name!r}, which is {field.type.kind}",
                hint="a subject is a Text",
            )
        return "subject"

    def _packed(self) -> tuple[str, str] | None:
        """See `packed`; raises SchemaError where grants could not judge the values one by one."""
        marks = (_PACKED_ID, _LENGTHS_ID)
        fields = self.param_codec.fields.values()
        values, lengths = ([f for f in fields if mark in f.marks] for mark in marks)
        if not values and not lengths:
            return None
        one_each = len(values) == len(lengths) == 1
        if not one_each or {f.type.kind for f in (*values, *lengths)} != {"data"}:
            raise SchemaError(
                f"{self.where} needs one Data with $Ww.packed and one with $Ww.lengths",
                hint="mark both, or none",
            )
        if _interfaces_in(self.result_codec):
            raise SchemaError(
                f"{self.where} takes packed values and returns capabilities",
                hint="return them by another method",
            )
        return values[0].name, lengths[0].name

    def __repr__(self) -> str:
        return f"<Method {self.where}({', '.join(self.params)})>"


class Interface:
    """An interface of a schema.

    Attributes:
        name: As in the schema; "Outer.Inner" for a nested one.
        id: The 64-bit ID that identifies it among all schemas.
        methods: By snake_case name, inherited ones included.
        lineage: The names of the interface and of all its ancestors.
        raw: pycapnp's schema object.
    """

    def __init__(self, raw: Any, types: Types) -> None:
        self.raw = raw
        self.id: int = int(raw.node.id)
        self.name: str = _name_of(raw)
        self.module: Any = _InterfaceModule(raw, self.name)
        self._types = types
        self._ancestors = _lineage(raw)
        self.lineage = frozenset(map(_name_of, self._ancestors))
        # Classes that the connection makes once per interface.
        self.ref_class: Any = None
        self.export_class: Any = None

    @functools.cached_property
    def methods(self) -> Mapping[str, Method]:
        """Reflected at first use: the types of two interfaces may refer to each other."""
        methods = (Method(self, *item, self._types) for item in self._raw())
        return MappingProxyType({method.name: method for method in methods})

    def _raw(self) -> Iterator[tuple[str, Any]]:
        """(name in the schema, pycapnp's method), ancestors first."""
        declared: dict[str, int] = {}
        python: dict[str, str] = {}
        for ancestor in self._ancestors:
            ancestor_id = int(ancestor.node.id)
            methods = ancestor.methods
            for name in ancestor.method_names:
                if declared.setdefault(name, ancestor_id) != ancestor_id:
                    # pycapnp dispatches by name alone.
                    raise SchemaError(
                        f"{self.name} inherits two different methods {name!r}",
                        hint="rename one of them",
                    )
                if python.setdefault(snake(name), name) != name:
                    raise SchemaError(
                        f"{self.name}: {name!r} and {python[snake(name)]!r} have the same name in "
                        "Python",
                        hint="rename one of them",
                    )
                yield name, methods[name]

    def reachable(self, through: Callable[[Method], bool] | None = None) -> tuple[Interface, ...]:
        """This interface and all those whose objects its holder can come to hold, this one first.

        What methods return, and what is handed to the holder's own callbacks; not the callbacks.
        Where `through` is given, only by the methods for which it is true.
        """
        return self._reachable if through is None else self._reach(through)

    @functools.cached_property
    def _reachable(self) -> tuple[Interface, ...]:
        return self._reach(lambda _: True)

    def _reach(self, through: Callable[[Method], bool]) -> tuple[Interface, ...]:
        found: dict[Interface, None] = {}
        seen: set[tuple[Interface, bool]] = set()
        todo = [(self, True)]  # (interface, whether the holder calls it, not the node)
        while todo:
            interface, called = todo.pop(0)
            if (interface, called) in seen:
                continue
            seen.add((interface, called))
            if called:
                found[interface] = None
            for method in interface.methods.values():
                if called and not through(method):
                    continue
                todo += [(held, not called) for held in _interfaces_in(method.param_codec)]
                todo += [(held, called) for held in _interfaces_in(method.result_codec)]
        return tuple(found)

    @property
    def naming(self) -> str | None:
        """The parameter that names the service's objects, where this is a service's interface.

        Raises SchemaError where it cannot be told which one does: a grant of one object is held to
        it, in every method that has it.
        """
        reached = self.reachable()
        by_name: dict[str, Interface] = {}
        for interface in reached:
            if by_name.setdefault(interface.name, interface) != interface:
                raise SchemaError(
                    f"{self.name} leads to two interfaces {interface.name!r}: grants know them by "
                    "their names",
                    hint="rename one of them",
                )
        named = [m for interface in reached for m in interface.methods.values() if m.named]
        for method in named:
            if method.named != named[0].named:
                raise SchemaError(
                    f"{self.name} leads to $Ww.name on {named[0].named!r} of {named[0].where} and "
                    f"on {method.named!r} of {method.where}: what NAME is cannot be told",
                    hint="give the parameter one name, or mark the other one $Ww.constrained",
                )
        return named[0].named if named else None

    def is_a(self, other: Interface) -> bool:
        """Whether this is `other` or inherits from it."""
        return any(int(a.node.id) == other.id for a in self._ancestors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interface) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Interface {self.name} @0x{self.id:x}>"


def _is_object(field: Field) -> bool:
    """Whether it is a capability of a known interface."""
    return field.type.kind == "other" and isinstance(field.type.holds, Interface)


def _fields_in(struct: Struct) -> Iterator[Field]:
    """The fields of a struct, and of all structs that it can hold."""
    todo, seen = [struct], {struct}
    while todo:
        for field in todo.pop(0).fields.values():
            yield field
            held = field.type.holds
            if isinstance(held, Struct) and held not in seen:
                seen.add(held)
                todo.append(held)


def _interfaces_in(struct: Struct) -> list[Interface]:
    """Those of the capabilities that a struct can hold."""
    held = (field.type.holds for field in _fields_in(struct))
    return [interface for interface in held if isinstance(interface, Interface)]


def _name_of(raw: Any) -> str:
    name: str = raw.node.displayName
    return name[name.rfind(":") + 1 :]


def _lineage(raw: Any) -> list[Any]:
    """The interface and all its ancestors, each once, ancestors first."""
    out: dict[int, Any] = {}

    def visit(schema: Any) -> None:
        for parent in schema.superclasses:
            if int(parent.node.id) not in out:
                visit(parent)
        out[int(schema.node.id)] = schema

    visit(raw)
    return list(out.values())


class Schema:
    """A loaded file: `schema.Topic` or `schema["Topic"]`, for a nested interface `schema["A.B"]`.

    Attributes:
        name: The file's name, without its folder.
        interfaces: By name.
    """

    def __init__(self, name: str, parser: Any, module: Any) -> None:
        self.name = name
        self._parser = parser  # owns the C++ objects that every interface points into
        self._by_id: dict[int, Interface] = {}
        self._types = Types(self._interface_of, _any_cap)
        self.interfaces: Mapping[str, Interface] = MappingProxyType(
            dict(self._collect(module, prefix=""))
        )
        for interface in self.interfaces.values():
            _ = interface.naming  # reflect now, so that a problem shows up here

    def _interface_of(self, raw: Any) -> Interface:
        type_id = int(raw.node.id)
        if (known := self._by_id.get(type_id)) is None:
            known = self._by_id[type_id] = Interface(raw, self._types)
        return known

    def _collect(self, module: Any, prefix: str) -> Iterator[tuple[str, Interface]]:
        for nested in module._nodeProto.nestedNodes:
            name = nested.name
            value = getattr(module, name, None)
            if isinstance(value, _InterfaceModule):
                yield f"{prefix}{name}", self._interface_of(value.schema)
            if hasattr(value, "_nodeProto"):
                yield from self._collect(value, f"{prefix}{name}.")

    def __getitem__(self, name: str) -> Interface:
        try:
            return self.interfaces[name]
        except KeyError:
            raise KeyError(
                f"{self.name} has no interface {name!r}; it has {', '.join(self.interfaces)}"
            ) from None

    def __getattr__(self, name: str) -> Interface:
        if not name.startswith("_"):
            with contextlib.suppress(KeyError):
                return self[name]
        raise AttributeError(f"{self.__dict__.get('name')} has no interface {name!r}")

    def __repr__(self) -> str:
        return f"<Schema {self.name}: {', '.join(self.interfaces)}>"


_WETWARE: Final = Path(__file__).resolve().parent.parent
IMPORT_DIRS: Final = (str(_WETWARE.parent), str(Path(capnp.__file__).resolve().parent.parent))
"""Where imports that begin with "/" are looked up."""


def parse(path: Path) -> Schema:
    """Load a schema file that is known to be good: a bad one aborts the process."""
    parser = SchemaParser()  # of its own: two plugins' files with one ID must not meet
    return Schema(path.name, parser, parser.load(str(path), imports=list(IMPORT_DIRS)))


_ww_parser = SchemaParser()
_ww_module = _ww_parser.load(str(_WETWARE / "schema" / "ww.capnp"), imports=list(IMPORT_DIRS))
_any_cap: Final = _ww_module.AnyCap.schema

WW: Final = Schema("ww.capnp", _ww_parser, _ww_module)
"""What the schemas of all services share."""
