"""Third-party distributions made without a build: a dist-info folder and a module in a directory.

Put the directory on PYTHONPATH (or `sys.path`) and they are installed. `BROKEN` is one distribution
for every way in which a plugin can be broken; each must leave a node working.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Broken:
    """A distribution that must not do harm.

    Attributes:
        source: The plugin's module.
        state: What `ww plugin list` must say.
        reason: A part of the reason that it must give.
        remedy: A part of the remedy.
        seen: What shows it: "load", "config", "commands" or "services".
        plugin: The plugin's name; default the distribution's.
        group: The entry point's group.
        requires: `Requires-Dist` lines.
        extras: `Provides-Extra` lines.
        files: Other files, by path relative to the package.
    """

    source: str
    state: str
    reason: str
    remedy: str = "pip uninstall"
    seen: str = "load"
    plugin: str = ""
    group: str = "wetware.v1"
    requires: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()


_HOOKIMPL = "from wetware.hookspecs import hookimpl\n"

BAD_SCHEMA = """\
from pathlib import Path
from wetware import rpc
from wetware.hookspecs import hookimpl

@hookimpl
def ww_register_services(ctx):
    rpc.load(Path(__file__).with_name("bad.capnp"))
    return ()
"""
"""Loading this file with pycapnp itself aborts the process."""

BROKEN: dict[str, Broken] = {
    "raises": Broken("raise ValueError('boom')", "failed", "ValueError: boom (plugin.py:1)"),
    "syntax": Broken("def f(:", "failed", "SyntaxError"),
    "exits": Broken("import sys; sys.exit(3)", "failed", "called sys.exit on import"),
    "quits": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_config():\n    raise SystemExit(0)\n",
        "failed",
        "called sys.exit in ww_register_config",
        seen="config",
    ),
    "hangs": Broken("import time; time.sleep(3600)", "failed", "hung on import"),
    "spins": Broken(
        "while True:\n    try:\n        while True: pass\n    except Exception: pass\n",
        "failed",
        "hung on import",
    ),
    "hangs_in_register": Broken(
        _HOOKIMPL
        + "import time\n@hookimpl\ndef ww_register_services(ctx):\n    time.sleep(3600)\n",
        "failed",
        "hung in ww_register_services",
        seen="services",
    ),
    "unknown_hook": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_servises(ctx):\n    return ()\n",
        "failed",
        "unknown hook 'ww_register_servises'; did you mean ww_register_services?",
    ),
    "hook_of_before": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_audit(record):\n    return None\n",
        "failed",
        "unknown hook 'ww_audit'; there are ww_register_auth, ww_register_commands,",
    ),
    "unmarked": Broken(
        "def ww_register_services(ctx):\n    return ()\n",
        "failed",
        "ww_register_services is not marked with @hookimpl",
    ),
    "bad_argument": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_services(context):\n    return ()\n",
        "failed",
        "context",
    ),
    "async_hook": Broken(
        _HOOKIMPL + "@hookimpl\nasync def ww_register_services(ctx):\n    return ()\n",
        "failed",
        "ww_register_services is async",
    ),
    "clash": Broken(
        "raise AssertionError('must not be imported')",
        "failed",
        "the name 'pubsub' is taken by wetware",
        plugin="pubsub",
    ),
    "needs": Broken(
        "import acme_database_driver",
        "unavailable",
        "needs 'acme_database_driver', which is not installed",
        "pip install 'ww-needs[db]'",
        requires=("acme-database-driver>=2; extra == 'db'",),
        extras=("db",),
    ),
    "older_core": Broken(
        "from wetware.errors import NoSuchError",
        "failed",
        "does not fit this version of wetware",
        "pip install --upgrade wetware ww-older-core",
    ),
    "future": Broken(
        "raise AssertionError('must not be imported')",
        "unavailable",
        "is written for hook API v2; this wetware speaks v1",
        "pip install --upgrade wetware",
        group="wetware.v2",
    ),
    "bad_schema": Broken(
        BAD_SCHEMA,
        "failed",
        "in ww_register_services:",
        "",
        seen="services",
        files=(
            ("bad.capnp", "@0x8d7e0a5b5d6e4f31;\ninterface Broken { f @0 (x :Nowhere) -> ( }\n"),
        ),
    ),
    "two_names": Broken(
        BAD_SCHEMA,
        "failed",
        "bad.capnp: Two leads to $Ww.name on 'queue' of Two.pull and on 'topic' of Two.read",
        "",
        seen="services",
        files=(
            (
                "bad.capnp",
                '@0x8d7e0a5b5d6e4f32;\nusing Ww = import "/wetware/schema/ww.capnp";\n'
                "interface Two { pull @0 (queue :Text $Ww.name); read @1 (topic :Text $Ww.name); }",
            ),
        ),
    ),
    "raises_in_register": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_services(ctx):\n    yield 1 / 0\n",
        "failed",
        "in ww_register_services: ZeroDivisionError",
        seen="services",
    ),
    "raises_in_commands": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_commands(app):\n"
        "    app.command('half')(lambda: None)\n    raise OSError('no')\n",
        "failed",
        "in ww_register_commands: OSError: no",
        seen="commands",
    ),
    "takes_a_command": Broken(
        _HOOKIMPL + "@hookimpl\ndef ww_register_commands(app):\n"
        "    app.command('node')(lambda: print('stolen'))\n",
        "failed",
        "its command 'node' has the name of one of 'wetware'",
        "[plugins] disable",
        seen="commands",
    ),
    "bad_config": Broken(
        _HOOKIMPL + "class C:\n    x = 1\n@hookimpl\ndef ww_register_config():\n    return C\n",
        "failed",
        "C is not a dataclass",
        "docs/reference/hooks.md",
        seen="config",
    ),
}

GOOD = """\
from dataclasses import dataclass
from wetware.hookspecs import hookimpl, setting

print("a plugin that talks on import")


@dataclass(frozen=True, slots=True)
class Config:
    greeting: str = setting("hello", "What is said.")


@hookimpl
def ww_register_config():
    return Config


@hookimpl
def ww_register_commands(app):
    @app.command("greet")
    def greet() -> None:
        "Say hello."
        print("hello from a third party")
"""

COUNTER_SCHEMA = """\
@0x8d7e0a5b5d6e4f33;
using Ww = import "/wetware/schema/ww.capnp";

interface Counters {
  incr @0 (name :Text $Ww.name, by :Int64) -> (value :Int64);
  get @1 (name :Text $Ww.constrained) -> (value :Int64);
  total @2 () -> (value :Int64);
}
"""
COUNTER = """\
from collections import Counter
from pathlib import Path
from wetware import rpc
from wetware.hookspecs import Service, hookimpl

SCHEMA = rpc.load(Path(__file__).with_name("counter.capnp"))


class Counters(rpc.Servant, interface=SCHEMA.Counters):
    def __init__(self, values):
        self.values = values

    async def incr(self, name, by):
        self.values[name] += by
        return {"value": self.values[name]}

    async def get(self, name):
        return {"value": self.values[name]}

    async def total(self):
        return {"value": self.values.total()}


class CounterService(Service):
    name, interface = "counter", SCHEMA.Counters

    def __init__(self):
        self.values = Counter()

    def bootstrap(self, principal):
        return Counters(self.values)


@hookimpl
def ww_register_services(ctx):
    return (CounterService(),)
"""
"""A service without objects of its own: each call names the counter that it is about."""

TWINS_SCHEMA = """\
@0x8d7e0a5b5d6e4f36;

interface Twins {
  put @0 (text :Text) -> ();
  ask @1 (peer :Text) -> (principal :Text, text :Text);
  # What the sibling at another member says: whom it takes this node for, and its text.
}
interface Twin {
  read @0 () -> (principal :Text, text :Text);
  wait @1 ();
}
"""
TWINS = """\
import asyncio
from pathlib import Path
from wetware import rpc
from wetware.hookspecs import Service, hookimpl
from wetware.identity import PeerId

SCHEMA = rpc.load(Path(__file__).with_name("twins.capnp"))


class Twins(rpc.Servant, interface=SCHEMA.Twins):
    def __init__(self, service):
        self.service = service

    async def put(self, text):
        self.service.text = text

    async def ask(self, peer):
        twin = await self.service.ctx.sibling(PeerId.parse(peer))
        return await twin.read()


class Twin(rpc.Servant, interface=SCHEMA.Twin):
    def __init__(self, service, node):
        self.service, self.node = service, node

    async def read(self):
        return {"principal": str(self.node), "text": self.service.text}

    async def wait(self):
        await asyncio.Event().wait()


class TwinsService(Service):
    name, interface, peer_interface = "twins", SCHEMA.Twins, SCHEMA.Twin

    def __init__(self, ctx):
        self.ctx, self.text = ctx, ""

    def bootstrap(self, principal):
        return Twins(self)

    def peer_bootstrap(self, node):
        return Twin(self, node)


@hookimpl
def ww_register_services(ctx):
    return (TwinsService(ctx),)
"""
"""A service that has siblings at other nodes."""


def install(
    directory: Path,
    plugin: str,
    source: str,
    *,
    dist: str = "",
    version: str = "1.2",
    group: str = "wetware.v1",
    requires: tuple[str, ...] = (),
    extras: tuple[str, ...] = (),
    files: tuple[tuple[str, str], ...] = (),
) -> str:
    """Write a distribution with one plugin into `directory`.

    Args:
        directory: What goes on PYTHONPATH.
        plugin: The entry point's name.
        source: The module that it names: `plugin.py` of a package of the distribution.
        dist: The distribution's name; default `ww-PLUGIN`.
        version: The distribution's version.
        group: The entry point's group.
        requires: `Requires-Dist` lines.
        extras: `Provides-Extra` lines.
        files: Other files, by path relative to the package.

    Returns the name of the package.
    """
    dist = dist or f"ww-{plugin.replace('_', '-')}"
    package = dist.replace("-", "_")
    folder = directory / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "plugin.py").write_text(source)
    for path, text in files:
        (folder / path).write_text(text)
    info = directory / f"{package}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {dist}",
        f"Version: {version}",
        *(f"Requires-Dist: {line}" for line in requires),
        *(f"Provides-Extra: {extra}" for extra in extras),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n\nNot a header: x\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{plugin} = {package}.plugin\n")
    return package


def install_broken(directory: Path, *names: str) -> None:
    """Install the named entries of `BROKEN`, or all of them."""
    for name in names or BROKEN:
        each = BROKEN[name]
        install(
            directory,
            each.plugin or name,
            each.source,
            dist=f"ww-{name.replace('_', '-')}",
            group=each.group,
            requires=each.requires,
            extras=each.extras,
            files=each.files,
        )
