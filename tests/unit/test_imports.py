"""Who may import whom, and what `import wetware` must not cost."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wetware import hookspecs

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "wetware"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/wetware_*/__init__.py"))
SOURCES = sorted(CORE.rglob("*.py")) + sorted(p for d in PLUGINS for p in d.rglob("*.py"))

# The core from the ground up. A room imports what stands above it in this table, and itself.
LAYERS = (
    "errors identity member base",
    "rpc",
    "overlay.link",
    "overlay.frames overlay.exchange overlay.peers overlay.rpc_pipe overlay.tunnel"
    " overlay.splice overlay.relay overlay.punching overlay.mapping",
    "overlay.libp2p overlay.admission",
    "overlay.membership",
    "broker",
    "hookspecs",
    "client",
    "config",
    "loader",
    "node",
    "testing",
    "cli",
    "__main__",
)
# Top-level module → the only folder of the core that may import it.
CONFINED = {
    "trio": "overlay/libp2p",
    "libp2p": "overlay/libp2p",
    "multiaddr": "overlay/libp2p",
    "capnp": "rpc",
}


@functools.cache
def imported(path: Path) -> tuple[tuple[int, str], ...]:
    """Line and dotted name of every import in a file, those inside functions included."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level else [node.module or ""]
            if node.level:
                package = path.relative_to(_root_of(path)).with_suffix("").parts[: -node.level]
                base = [".".join((*package, *([node.module] if node.module else [])))]
            for alias in node.names:
                yield node.lineno, f"{base[0]}.{alias.name}"
        elif isinstance(node, ast.Call) and _is_import_call(node):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def module_of(path: Path) -> str:
    parts = path.relative_to(_root_of(path)).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _root_of(path: Path) -> Path:
    return (
        CORE.parent
        if path.is_relative_to(CORE)
        else next(d.parent for d in PLUGINS if path.is_relative_to(d))
    )


def _is_import_call(node: ast.Call) -> bool:
    """`importlib.import_module("x")`, `import_module("x")`, `__import__("x")`."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def violations(rule: object) -> list[str]:
    assert callable(rule)
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in SOURCES
        for line, name in imported(path)
        if rule(path, name)
    ]


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20
    assert {d.name for d in PLUGINS} >= {"wetware_auth_local", "wetware_pubsub"}


BUNDLED = CORE / "client" / "bundled.py"  # what `session.NAME` is, for type checkers alone


def test_the_core_imports_no_plugin() -> None:
    def rule(path: Path, name: str) -> bool:
        return path.is_relative_to(CORE) and name.startswith("wetware_") and path != BUNDLED

    assert violations(rule) == []


def test_the_types_of_bundled_clients_bring_nothing_in() -> None:
    assert not {m for m in loaded_by("import wetware.client.bundled") if m.startswith("wetware_")}


def test_no_plugin_imports_another() -> None:
    def rule(path: Path, name: str) -> bool:
        top = name.partition(".")[0]
        return (
            not path.is_relative_to(CORE)
            and top.startswith("wetware_")
            and top not in path.relative_to(ROOT).parts
        )

    assert violations(rule) == []


# What a plugin may import of wetware: the contract (docs/reference/plugin-promise.md), …
CONTRACT = "hookspecs rpc errors identity member testing client"
# … and, beside it, what is promised to nobody:
NO_CONTRACT = {
    "base": "tools: the log, files, bounds, CBOR",
    "cli": "the looks of `ww`, for commands",
    "config": "commands that look into ww.toml",
    "overlay.link overlay.frames overlay.exchange": "one question to a member, and its answer",
    "broker.methods broker.naming broker.where broker.values": "the grammar of roles and grants",
    "broker.records": "how records are written",
}


def test_plugins_import_the_contract() -> None:
    """A room of the core that plugins use is named here; what the contract has comes from it."""
    rooms = f"{CONTRACT} {' '.join(NO_CONTRACT)}".split()

    def rule(path: Path, name: str) -> bool:
        if path.is_relative_to(CORE) or not name.startswith("wetware."):
            return False
        module, _, last = name.rpartition(".")
        elsewhere = last in hookspecs.__all__ and module != "wetware.hookspecs"
        return elsewhere or not any(f"{name}.".startswith(f"wetware.{room}.") for room in rooms)

    assert violations(rule) == []


@pytest.mark.parametrize("module", CONFINED)
def test_foreign_engines_stay_in_their_folder(module: str) -> None:
    home = CORE / CONFINED[module]
    assert (
        violations(
            lambda path, name: name.partition(".")[0] == module and not path.is_relative_to(home)
        )
        == []
    )


def layer(name: str) -> int | None:
    """The height of a module of the core; None for the front door, `wetware` itself."""
    for height, rooms in enumerate(LAYERS):
        if any(f"{name}.".startswith(f"wetware.{room}.") for room in rooms.split()):
            return height
    return None


def test_imports_go_downwards() -> None:
    """Those for type checkers as well: who reads a type has to know what it stands on."""

    def rule(path: Path, name: str) -> bool:
        own = layer(module_of(path))
        other = layer(name)
        return own is not None and other is not None and other > own

    assert violations(rule) == []


def test_every_file_has_a_layer() -> None:
    assert [p for p in CORE.rglob("*.py") if layer(module_of(p)) is None] == [
        CORE / "__init__.py",
        CORE / "overlay" / "__init__.py",
    ]


def test_no_file_imports_itself_through_others() -> None:
    """Neither in the core nor in a plugin."""
    modules = {module_of(path): path for path in SOURCES}
    below: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for _, name in imported(path)}
        found = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys()
        below[module] = found - {module}
    while ends := {module for module, names in below.items() if not names}:
        below = {m: names - ends for m, names in below.items() if m not in ends}
    assert below == {}, "in a circle, or above one"


def test_the_services_of_the_core_know_no_node() -> None:
    """They get a context and what they need beyond it, as a plugin's would."""
    assert (
        violations(
            lambda path, name: (
                path.is_relative_to(CORE / "node" / "services") and name.startswith("wetware.node")
            )
        )
        == []
    )


def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import a.b\nfrom c import d\ndef f():\n    import e\n"
        "    importlib.import_module('g')\n    __import__('h')\n"
    )
    assert [name for _, name in imported(path)] == ["a.b", "c.d", "e", "g", "h"]


def loaded_by(code: str) -> set[str]:
    """The top-level modules, and those of wetware, after running code in a new interpreter."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(run.stdout))


HEAVY = {"trio", "libp2p", "multiaddr", "grpc", "web3", "wasmtime"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import wetware", HEAVY | {"capnp", "asyncio", "cryptography", "pluggy"}),
        ("import wetware.overlay.link", HEAVY | {"capnp", "wetware.rpc", "wetware.overlay.libp2p"}),
        (
            "import wetware.client",
            HEAVY
            | {
                "wetware.overlay.libp2p",
                "wetware.overlay.admission",
                "wetware.overlay.membership",
                "pluggy",
            },
        ),
        ("import wetware.config", HEAVY | {"capnp", "cryptography", "wetware.overlay.link"}),
        (
            "import typer; from wetware.cli.mount import mount_commands as m; m(typer.Typer(), [])",
            HEAVY
            | {
                "asyncio",
                "capnp",
                "cryptography",
                "http.cookiejar",
                "wetware.overlay.link",
                "wetware.rpc",
                "packaging",
            },
        ),
        ("from wetware.cli.main import build; build()", HEAVY | {"capnp", "wetware.rpc"}),
        (
            "from wetware.cli.main import build; build(['status'])",
            HEAVY | {"capnp", "wetware.rpc", "wetware.loader", "importlib.metadata"},
        ),
    ],
)
def test_what_an_import_does_not_bring_in(code: str, absent: set[str]) -> None:
    assert loaded_by(code) & absent == set()
