"""Runs in the guest: what the node's driver calls, once in the life of an instance.

What is imported here is in the runner from its start, which costs an instance nothing; there are no
other modules of the standard library.
"""

import contextlib
import encodings
import importlib
import io
import json
import linecache
import os
import pkgutil
import random
import sys
import types
import zipfile
from importlib.machinery import ModuleSpec

import wit_world
import ww
from wit_world.imports import host

_NOT = {"antigravity", "idlelib", "this", "turtle", "turtledemo"}
_MORE = (
    "collections.abc", "concurrent.futures", "email.message", "email.mime.text", "html.entities",
    "html.parser", "http.client", "http.cookies", "importlib.metadata", "importlib.resources",
    "json.tool", "logging.config", "logging.handlers", "os.path", "unittest.mock", "urllib.parse",
    "urllib.request", "urllib.robotparser", "wsgiref.util", "xml.dom.minidom",
    "xml.etree.ElementTree", "xml.sax", "zoneinfo",
)  # fmt: skip
_ENCODINGS = (f"encodings.{each.name}" for each in pkgutil.iter_modules(encodings.__path__))
for _name in [*sorted(sys.stdlib_module_names - _NOT), *_MORE, *_ENCODINGS]:
    with contextlib.suppress(Exception):  # what needs threads, a display or another library
        importlib.import_module(_name)

# The runtime seeds it before each run, with 2,496 bytes that are ten calls of the host. `run` has a
# seed from its only call.
_seed, random.seed = random.seed, lambda *_: None
os.environ.clear()  # of who built it

# As they are, they have no buffer, and of a long text they write a part.
for _fd, _name, _errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
    _raw = io.BufferedWriter(io.FileIO(_fd, "w", closefd=False))
    setattr(sys, _name, io.TextIOWrapper(_raw, "utf-8", _errors, line_buffering=True))


class WitWorld(wit_world.WitWorld):
    """The world of runner.wit."""

    def run(self) -> int:
        """Run the program that was given; returns its exit code."""
        random.seed = _seed
        head, _, code = host.given().partition("\n")
        given = json.loads(head)
        random.seed(given["seed"])  # every instance begins with the same state
        os.environ.update(given["env"])
        sys.argv = given["args"]
        parts = [code.encode("latin-1")]
        while (at := sum(map(len, parts))) < given["code"]:
            parts.append(host.code(at).encode("latin-1"))
        try:
            _run(b"".join(parts), sys.argv[0])
        except SystemExit as exc:
            if exc.code is None or isinstance(exc.code, int):
                return _flushed((exc.code or 0) & 0xFF)
            sys.stderr.write(f"{exc.code}\n")
            return _flushed(1)
        except BaseException as exc:
            sys.stderr.write(ww.told(exc))
            return _flushed(1)
        return _flushed(0)


def _run(code: bytes, name: str) -> None:
    if code.startswith(b"PK"):
        archive = Archive(code)
        sys.meta_path.insert(0, archive)
        code = archive.source("__main__.py")
        name = f"{name}/__main__.py"
    main = types.ModuleType("__main__")
    main.__file__ = name
    sys.modules["__main__"] = main
    execute(code, main, name)


def execute(source: bytes, module: types.ModuleType, name: str) -> None:
    lines = source.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - what it is for


class Archive:
    """Imports modules from a zip archive."""

    def __init__(self, data: bytes) -> None:
        self._zip = zipfile.ZipFile(io.BytesIO(data))
        self._names = set(self._zip.namelist())

    def source(self, path: str) -> bytes:
        if path not in self._names:
            raise ImportError(f"the archive has no {path}")
        return self._zip.read(path)

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        base = fullname.replace(".", "/")
        for file, package in ((f"{base}/__init__.py", True), (f"{base}.py", False)):
            if file in self._names:
                return ModuleSpec(fullname, self, origin=file, is_package=package)
        if any(name.startswith(f"{base}/") for name in self._names):
            return ModuleSpec(fullname, None, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        origin = module.__spec__.origin
        module.__file__ = origin
        execute(self.source(origin), module, origin)

    def get_data(self, path: str) -> bytes:
        try:
            return self.source(path)
        except ImportError as exc:
            raise FileNotFoundError(path) from exc


def _flushed(code: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            return code or 1
    return code
