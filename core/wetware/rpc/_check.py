"""Compile one schema in a process of its own: the compiler aborts the process on a bad file.

Run as `python -I _check.py CAPNP_PARENT FILE IMPORT_DIR…`. Exit status 0 means that the file loads
and that every type in it can be reflected on. Imports nothing of wetware: it must start fast.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

CPU_S_MAX = 10
MEMORY_BYTES_MAX = 2 << 30
TYPES_MAX = 10_000


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an expected abort leaves no core file
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


_WITH_SCHEMA = frozenset({"struct", "interface", "list", "enum"})


class _Walk:
    """Touches everything that binding a servant touches, so that it cannot abort the node later.

    Args:
        error: What pycapnp raises.
    """

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.seen: set[int] = set()

    def struct(self, schema: Any) -> None:
        node = schema.node
        if node.id in self.seen:
            return
        self.seen.add(node.id)
        if len(self.seen) > TYPES_MAX:
            raise ValueError(f"more than {TYPES_MAX} types")
        for field in schema.fields.values():
            proto = field.proto
            for annotation in proto.annotations:
                _ = annotation.id
            if proto.which() == "group":
                self.struct(field.schema)
            elif proto.slot.type.which() in _WITH_SCHEMA:
                self.type(field.schema)

    def type(self, schema: Any) -> None:
        name = type(schema).__name__
        if name == "_StructSchema":
            self.struct(schema)
        elif name == "_InterfaceSchema":
            self.interface(schema)
        elif name == "_EnumSchema":
            _ = schema.enumerants
        elif name == "_ListSchema":
            try:
                element = schema.elementType
            except self.error:  # pycapnp raises for lists of scalars: nothing to walk
                return
            self.type(element)

    def interface(self, schema: Any) -> None:
        node = schema.node
        if node.id in self.seen:
            return
        self.seen.add(node.id)
        for method in schema.methods_inherited.values():
            self.struct(method.param_type)
            self.struct(method.result_type)
        for parent in schema.superclasses:
            self.interface(parent)

    def module(self, module: Any) -> None:
        for nested in module._nodeProto.nestedNodes:
            value = getattr(module, nested.name, None)
            schema = getattr(value, "schema", None)
            if type(schema).__name__ in ("_StructSchema", "_InterfaceSchema", "_EnumSchema"):
                self.type(schema)
                self.module(value)


def main(argv: list[str]) -> int:
    """Load the file and walk its types; a nonzero status or an abort means that it is bad."""
    capnp_parent, path, *imports = argv
    sys.path.insert(0, capnp_parent)
    _limit()
    from capnp.lib.capnp import KjException, SchemaParser

    _Walk(KjException).module(SchemaParser().load(path, imports=imports))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
