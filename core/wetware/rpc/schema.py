"""Schemas: loaded once, checked first.

A bad `.capnp` file makes Cap'n Proto's compiler abort the process, which Python cannot catch. So a
file is compiled in a subprocess first, and what passed is remembered by the hash of the file, of
all that it imports, and of pycapnp's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import capnp
from capnp.lib.capnp import SchemaParser, _InterfaceModule

from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, SchemaError
from wetware.rpc.codec import Struct, Types
from wetware.rpc.names import snake

log = get_logger("rpc")

SCHEMA_BYTES_MAX: Final = 1 << 20
"""Of one file. The largest schema of Cap'n Proto itself is 25 kB."""
SCHEMA_FILES_MAX: Final = 256
"""A schema and what it imports."""
CHECK_S: Final = 20.0
"""How long a check may take on a loaded machine; an honest one takes 0.1 s."""
_ERROR_CHARS_MAX: Final = 500

_CAPNP_PARENT: Final = Path(capnp.__file__).resolve().parent.parent
_WETWARE_PARENT: Final = Path(__file__).resolve().parent.parent.parent
_IMPORT_DIRS: Final = tuple(dict.fromkeys((str(_WETWARE_PARENT), str(_CAPNP_PARENT))))
_CHECK: Final = Path(__file__).with_name("_check.py")
_CONSTRAINED_ID: Final = 0xB3C1DE9A40F7C2A5  # `constrained` in schema/ww.capnp
_NAME_ID: Final = 0xA94D2F3E6B1C7085  # `name`, likewise

_loaded: dict[tuple[str, str], Schema] = {}


class Method:
    """One method of an interface.

    Attributes:
        name: In snake_case.
        interface: The interface that it was found in; for an inherited method the heir.
        constrainable: Parameters on which a grant may put a predicate.
        gives: The interfaces of what it returns, if all that its caller gets of it are these
            capabilities; else empty.
        named: The parameter that names an object of the service, as `ww share SERVICE:NAME` does.
        param_kinds: Parameter → "text", "data", "int", "float", "bool", "enum", "list" or "other".
        params: Names of the parameters, in the schema's order.
        results: Names of the results.
        takes: Parameter → the interface of the object that it wants.
        where: "Interface.method", for messages and logs.
        wire: The name in the schema.
    """

    __slots__ = (
        "constrainable",
        "gives",
        "interface",
        "name",
        "named",
        "param_bytes",
        "param_codec",
        "param_kinds",
        "params",
        "raw",
        "result_codec",
        "result_flat",
        "results",
        "takes",
        "where",
        "wire",
    )

    def __init__(self, interface: Interface, wire: str, raw: Any, types: Types) -> None:
        self.interface = interface
        self.raw = raw
        self.wire = wire
        self.name = snake(wire)
        self.where = f"{interface.name}.{self.name}"
        param_type, result_type = raw.param_type, raw.result_type
        self.param_codec: Struct = types.struct(param_type)
        self.result_codec: Struct = types.struct(result_type)
        self.params = tuple(self.param_codec.fields)
        self.results = tuple(self.result_codec.fields)
        marks = {
            snake(field.name): {int(annotation.id) for annotation in field.annotations}
            for field in param_type.node.struct.fields
        }
        self.constrainable = frozenset(
            param for param, ids in marks.items() if ids & {_CONSTRAINED_ID, _NAME_ID}
        )
        self.param_kinds: Mapping[str, str] = {
            snake(wire): _kind(field) for wire, field in param_type.fields.items()
        }
        self.takes: Mapping[str, Interface] = {
            snake(wire): types.interface_of(field.schema)
            for wire, field in param_type.fields.items()
            if _is_capability(field)
        }
        self.named = self._named([param for param, ids in marks.items() if _NAME_ID in ids])
        returned = list(result_type.fields.values())
        bare = all(_is_capability(f) for f in returned) and not _interfaces_in(param_type, set())
        self.gives: frozenset[Interface] = frozenset(
            types.interface_of(field.schema) for field in returned if bare
        )
        # The fixed part of the parameters; None where the size has to be measured.
        words = param_type.node.struct.dataWordCount + param_type.node.struct.pointerCount
        self.param_bytes: int | None = words * 8 if self.param_codec.flat else None
        self.result_flat: bool = self.result_codec.flat

    def _named(self, marked: list[str]) -> str | None:
        """The parameter with `$Ww.name`; raises SchemaError where no grant could be held to it."""
        if len(marked) > 1:
            raise SchemaError(
                f"{self.where} has $Ww.name on {marked[0]!r} and {marked[1]!r}: "
                "a call is about one object",
                hint="mark the other one $Ww.constrained",
            )
        for param in marked:
            if (kind := self.param_kinds[param]) in ("list", "other"):
                what = "a list" if kind == "list" else "neither text nor data, number or enum"
                raise SchemaError(
                    f"{self.where} has $Ww.name on {param!r}, which is {what}: it names no object",
                    hint="pass the name as a parameter of its own",
                )
        if (inner := _name_within(self.raw.param_type, set())) is not None:
            raise SchemaError(
                f"{self.where} has $Ww.name on {inner!r} within a parameter, where no grant can be "
                "held to it",
                hint="pass the name as a parameter of its own",
            )
        return marked[0] if marked else None

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
        node = raw.node
        self.raw = raw
        self.id: int = int(node.id)
        self.name: str = _name_of(raw)
        self.lineage = frozenset(_name_of(ancestor) for ancestor in _lineage(raw))
        self.module: Any = _InterfaceModule(raw, self.name)
        self._types = types
        self._methods: Mapping[str, Method] | None = None
        self._reachable: tuple[Interface, ...] | None = None
        # Classes that the connection makes once per interface.
        self.ref_class: Any = None
        self.export_class: Any = None

    @property
    def methods(self) -> Mapping[str, Method]:
        """Reflected at first use: the types of two interfaces may refer to each other."""
        if self._methods is None:
            self._methods = MappingProxyType(
                {m.name: m for m in (Method(self, *item, self._types) for item in self._raw())}
            )
        return self._methods

    def _raw(self) -> Iterator[tuple[str, Any]]:
        """(name in the schema, pycapnp's method), ancestors first."""
        declared: dict[str, int] = {}
        python: dict[str, str] = {}
        for ancestor in _lineage(self.raw):
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
        if through is not None:
            return self._reach(through)
        if self._reachable is None:  # found at first use: constraints are judged by it
            self._reachable = self._reach(lambda _: True)
        return self._reachable

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
                for struct, by_holder in (
                    (method.raw.param_type, not called),
                    (method.raw.result_type, called),
                ):
                    held = _interfaces_in(struct, set())
                    todo += [(self._types.interface_of(raw), by_holder) for raw in held]
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
        return any(int(a.node.id) == other.id for a in _lineage(self.raw))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interface) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Interface {self.name} @0x{self.id:x}>"


_KINDS: Final = {
    "text": "text",
    "data": "data",
    "bool": "bool",
    "enum": "enum",
    "list": "list",
    "float32": "float",
    "float64": "float",
    **{f"{sign}{bits}": "int" for sign in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def _kind(field: Any) -> str:
    proto = field.proto
    if proto.which() == "group":
        return "other"
    return _KINDS.get(proto.slot.type.which(), "other")


def _is_capability(field: Any) -> bool:
    return field.proto.which() == "slot" and field.proto.slot.type.which() == "interface"


def _held(field: Any) -> Any | None:
    """Pycapnp's schema of the struct or interface that a field holds, in lists too, or None."""
    if field.proto.which() == "group":
        return field.schema
    kind, schema = field.proto.slot.type, None
    while kind.which() == "list":
        kind = kind.list.elementType
        if kind.which() in ("list", "struct", "interface"):
            schema = (field.schema if schema is None else schema).elementType
    if kind.which() not in ("struct", "interface"):
        return None
    return field.schema if schema is None else schema


def _interfaces_in(struct: Any, seen: set[int]) -> list[Any]:
    """Pycapnp's schemas of the interfaces that a struct's fields can hold."""
    struct_id = int(struct.node.id)
    if struct_id in seen:
        return []
    seen.add(struct_id)
    found: list[Any] = []
    for field in struct.fields.values():
        held = _held(field)
        if held is not None and held.node.which() == "interface":
            found.append(held)
        elif held is not None:
            found += _interfaces_in(held, seen)
    return found


def _name_within(struct: Any, seen: set[int]) -> str | None:
    """A field with `$Ww.name` of a struct that a struct's fields hold, or None."""
    for field in struct.fields.values():
        held = _held(field)
        if held is None or held.node.which() != "struct" or int(held.node.id) in seen:
            continue
        seen.add(int(held.node.id))
        for inner in held.node.struct.fields:
            if any(int(annotation.id) == _NAME_ID for annotation in inner.annotations):
                return snake(inner.name)
        if (deeper := _name_within(held, seen)) is not None:
            return deeper
    return None


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


def load(path: str | os.PathLike[str]) -> Schema:
    """Load a schema file; the same object for the same content.

    Imports are looked up beside the importing file, and those that begin with "/" in the folders
    that hold the packages `wetware` and `capnp` ("/wetware/schema/ww.capnp",
    "/capnp/stream.capnp"). Takes 0.1 to 0.2 s for a file that this user has not loaded before.
    Raises SchemaError that names the file, the line and what the compiler said.
    """
    path = Path(path)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise SchemaError(
            f"{path.name}: there is no such schema file", hint="check the name of the file"
        ) from None
    if not real.is_file():
        raise SchemaError(f"{path.name} is not a file", hint="name the .capnp file itself")
    if real.suffix != ".capnp":
        raise SchemaError(
            f"{path.name}: a schema file's name ends with .capnp", hint="rename the file"
        )
    digest = _digest(real)
    key = (str(real), digest)
    if (known := _loaded.get(key)) is not None:
        return known
    _check(real, digest)
    parser = SchemaParser()  # of its own: two plugins' files with one ID must not meet
    try:
        schema = Schema(path.name, parser, parser.load(str(real), imports=list(_IMPORT_DIRS)))
    except SchemaError as exc:
        raise SchemaError(f"{path.name}: {exc.message}", hint=exc.hint) from None
    except (InvalidArgument, capnp.KjException, ValueError, OSError) as exc:
        raise SchemaError(f"{path.name}: {_first_line(str(exc))}", hint="mend the schema") from None
    _loaded[key] = schema
    return schema


# --- the check
# --------------------------------------------------------------------------------------

_IMPORT = re.compile(rb'\b(import|embed)\s*"([^"\n]{1,1024})"')


def _digest(path: Path) -> str:
    """The hash of a file, all that it imports, and the versions that judge it."""
    digest = hashlib.sha256(f"1 {capnp.__version__} {sys.version_info[:2]}\n".encode())
    digest.update(_CHECK.read_bytes())
    queue, seen = [path], {path}
    while queue:
        file = queue.pop(0)
        try:
            with file.open("rb") as stream:
                data = stream.read(SCHEMA_BYTES_MAX + 1)
        except OSError as exc:
            raise SchemaError(
                f"{file.name}: cannot be read: {exc.strerror}", hint="check the file's permissions"
            ) from None
        if len(data) > SCHEMA_BYTES_MAX:
            raise SchemaError(
                f"{file.name} is larger than {SCHEMA_BYTES_MAX} bytes",
                hint="split the schema into files",
            )
        # The folder decides what a relative import means.
        digest.update(b"%s\n%d\n" % (os.fsencode(file), len(data)) + data)
        for kind, name in _IMPORT.findall(data):
            found = _resolve(file, os.fsdecode(name))
            if found is None or found in seen:
                continue
            if kind == b"embed":
                digest.update(str(found.stat().st_mtime_ns).encode())
                continue
            seen.add(found)
            if len(seen) > SCHEMA_FILES_MAX:
                raise SchemaError(f"{path.name} imports more than {SCHEMA_FILES_MAX} files")
            queue.append(found)
    return digest.hexdigest()


def _resolve(importer: Path, name: str) -> Path | None:
    if name.startswith("/"):
        candidates = [Path(folder, name[1:]) for folder in _IMPORT_DIRS]
    else:
        candidates = [importer.parent / name]
    for candidate in candidates:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if candidate.is_file():
                return candidate.resolve()
    return None  # the compiler will say so


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()
    return root / "wetware" / "schema"


def _check(path: Path, digest: str) -> None:
    """Compile the file in a subprocess unless it passed before; raises SchemaError."""
    mark: Path | None = None
    try:
        mark = _cache_dir() / digest
        if mark.exists():
            return
    except (OSError, RuntimeError):  # no home, or no access to it: then without the cache
        mark = None
    command = [sys.executable, "-I", str(_CHECK), str(_CAPNP_PARENT), str(path), *_IMPORT_DIRS]
    try:
        done = subprocess.run(  # noqa: S603  # our own script, on a file that was resolved above
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=CHECK_S,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise SchemaError(
            f"{path.name}: compiling it took longer than {CHECK_S:.0f} s",
            hint="simplify the schema",
        ) from None
    except OSError as exc:
        raise SchemaError(
            f"{path.name}: cannot start a process to check it: {exc.strerror}",
            hint="free some memory or processes",
        ) from None
    if done.returncode != 0:
        raise _explain(path, done.returncode, done.stderr.decode("utf-8", "replace"))
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark.touch(mode=0o600)  # empty: being there says it all, so it is written atomically


_FAILED = re.compile(r"^(?:\s*what\(\):\s*)?(\S*?):(\d+): failed: (.*)$")


def _explain(path: Path, status: int, stderr: str) -> SchemaError:
    """What the compiler said, without folders: `chat.capnp:3: Not defined: Nope`."""
    for line in reversed(stderr.splitlines()):
        if (match := _FAILED.match(line)) and match[1].endswith(".capnp"):
            name = match[1].rpartition("/")[2]
            # The compiler counts lines from 0.
            message = f"{name}:{int(match[2]) + 1}: {_first_line(match[3])}"
            break
        if match and "/" not in match[1].removeprefix("capnp/").removeprefix("kj/"):
            message = f"{path.name}: {_first_line(match[3])}"
            break
    else:
        last = next((x for x in reversed(stderr.splitlines()) if x.strip()), "")
        message = f"{path.name}: {_first_line(last) or f'the compiler ended with {status}'}"
    log.warning("schema.refused", file=path.name, error=message)
    return SchemaError(message, hint="mend the schema and load it again")


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    line = re.sub(r"(/[\w.@+-]+)+/", "", line)  # folders are nobody's business
    return line[:_ERROR_CHARS_MAX]


# Part of this package and covered by its tests: no subprocess needed.
_ww_parser = SchemaParser()
_ww_module = _ww_parser.load(
    str(_WETWARE_PARENT / "wetware" / "schema" / "ww.capnp"), imports=list(_IMPORT_DIRS)
)
_any_cap: Final = _ww_module.AnyCap.schema

WW: Final = Schema("ww.capnp", _ww_parser, _ww_module)
"""What the schemas of all services share."""
