"""Loading a schema file: compiled by a child process first.

A bad `.capnp` file makes Cap'n Proto's compiler abort the process, which Python cannot catch. What
a child survived is remembered by the hash of the file, of all that it imports, and of the versions
that judge it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import capnp

from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, SchemaError
from wetware.rpc import codec, schema
from wetware.rpc.schema import IMPORT_DIRS, Interface, Schema, parse

log = get_logger("rpc")

SCHEMA_BYTES_MAX: Final = 1 << 20
"""Of one file. The largest schema of Cap'n Proto itself is 25 kB."""
SCHEMA_FILES_MAX: Final = 256
"""A schema and what it imports."""
CHECK_S: Final = 20.0
"""How long a check may take on a loaded machine; an honest one takes 0.2 s."""
_ERROR_CHARS_MAX: Final = 500

_CHECK: Final = Path(__file__).with_name("_check.py")
_loaded: dict[tuple[str, str], Schema] = {}


def known(type_id: int) -> Interface | None:
    """The interface with this ID among the schemas that this process has loaded.

    For a capability whose interface a peer names: what it says is tried, and not believed.
    """
    for loaded in (schema.WW, *_loaded.values()):
        for interface in loaded.interfaces.values():
            if interface.id == type_id:
                return interface
    return None


def load(path: str | os.PathLike[str]) -> Schema:
    """Load a schema file; the same object for the same content.

    Imports are looked up beside the importing file, and those that begin with "/" in the folders
    that hold the packages `wetware` and `capnp` ("/wetware/schema/ww.capnp",
    "/capnp/stream.capnp"). Takes 0.2 to 0.3 s for a file that this user has not loaded before.
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
    try:
        loaded = parse(real)
    except SchemaError as exc:
        raise SchemaError(f"{path.name}: {exc.message}", hint=exc.hint) from None
    except (InvalidArgument, capnp.KjException, ValueError, OSError) as exc:
        raise SchemaError(f"{path.name}: {_first_line(str(exc))}", hint="mend the schema") from None
    _loaded[key] = loaded
    return loaded


# --- the check ------------------------------------------------------------------------------------

_IMPORT = re.compile(rb'\b(import|embed)\s*"([^"\n]{1,1024})"')


def _digest(path: Path) -> str:
    """The hash of a file, all that it imports, and the versions that judge it."""
    digest = hashlib.sha256(f"1 {capnp.__version__} {sys.version_info[:2]}\n".encode())
    for judge in (_CHECK, Path(codec.__file__), Path(schema.__file__)):
        digest.update(judge.read_bytes())
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
        candidates = [Path(folder, name[1:]) for folder in IMPORT_DIRS]
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
    command = [
        sys.executable,
        "-I",
        str(_CHECK),
        os.pathsep.join(filter(None, sys.path)),
        str(path),
    ]
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
