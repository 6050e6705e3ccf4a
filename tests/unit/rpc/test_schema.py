"""Loading schemas: what is reflected, and that no file can take the process down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import SchemaError
from wetware.rpc import compiler

ID = "@0xb8f1e0a2c3d4e5f7;\n"
WW = ID + 'using Ww = import "/wetware/schema/ww.capnp"; '


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wetware" / "schema"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the subprocesses that were started."""
    started: list[list[str]] = []
    run = subprocess.run

    def counted(command: list[str], **kwargs: Any) -> Any:
        started.append(command)
        return run(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", counted)
    return started


def write(folder: Path, text: str | bytes, name: str = "bad.capnp") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reflection(schema: rpc.Schema) -> None:
    assert set(schema.interfaces) == {"Cell", "Counter", "Zoo", "Newer"}
    assert schema.Zoo is schema["Zoo"]
    method = schema.Zoo.methods["data"]
    assert (method.name, method.interface, method.where) == ("data", schema.Zoo, "Zoo.data")
    assert method.params == ("data", "name")
    assert method.results == ("data",)
    assert method.constrainable == {"data"}
    assert schema.Zoo.methods["make"].constrainable == frozenset()
    assert list(schema.Counter.methods) == ["get", "set", "add"]
    inherited = schema.Counter.methods["set"]
    assert inherited.interface is schema.Counter
    assert inherited.constrainable == {"value"}
    assert schema.Counter.is_a(schema.Cell)
    assert not schema.Cell.is_a(schema.Counter)
    with pytest.raises(KeyError, match="has no interface 'Zo'"):
        schema["Zo"]
    with pytest.raises(AttributeError, match="has no interface 'Zo'"):
        _ = schema.Zo


def test_nested_interfaces_and_imports(tmp_path: Path) -> None:
    write(tmp_path, "@0xb8f1e0a2c3d4e501;\nstruct S { x @0 :Text; }\n", "other.capnp")
    path = write(
        tmp_path,
        ID
        + """
        using Other = import "other.capnp";
        using Ww = import "/wetware/schema/ww.capnp";
        struct Outer { interface Inner { go @0 (s :Other.S $Ww.constrained) -> stream; } }
        """,
        "good.capnp",
    )
    schema = rpc.load(path)
    assert list(schema.interfaces) == ["Outer.Inner"]
    inner = schema["Outer.Inner"]
    assert inner.name == "Outer.Inner"
    assert inner.methods["go"].constrainable == {"s"}


def test_one_parameter_names_the_objects_of_a_service(tmp_path: Path) -> None:
    text = """
        interface Files {
            open @0 (path :Text $Ww.name) -> (file :File);
            root @1 () -> (file :File);
        }
        interface File {
            copy @0 (path :Text $Ww.name) -> ();
            look @1 (sink :Sink) -> (file :File);
            read @2 () -> (data :Data);
        }
        interface Sink { seen @0 (name :Text $Ww.name) -> (); }
    """
    schema = rpc.load(write(tmp_path, WW + text))
    assert schema.Files.naming == schema.File.naming == "path"
    assert schema.Sink.naming == "name", "the holder's own objects are another matter"
    assert schema.Files.methods["open"].gives == {schema.File}
    assert schema.File.methods["look"].gives == frozenset(), "the sink may be given something"
    assert schema.File.methods["read"].gives == frozenset()
    all_of_it = schema.Files.reachable()
    assert all_of_it == (schema.Files, schema.File)
    assert schema.Files.reachable(lambda method: method.name == "read") == (schema.Files,)


def test_load_returns_the_same_object(tmp_path: Path, schema: rpc.Schema) -> None:
    assert rpc.load(Path(__file__).with_name("zoo.capnp")) is schema
    assert rpc.load(os.path.relpath(Path(__file__).with_name("zoo.capnp"))) is schema


BAD = {
    "type": (ID + "struct A { x @0 :Nope; }", "bad.capnp:2: Not defined: Nope"),
    "syntax": (ID + "\n\nstruct A { x @0 \n", "bad.capnp:5: Parse error"),
    "import": (ID + 'using X = import "nope.capnp"; struct A { x @0 :X.Y; }', "nope.capnp"),
    "ordinals": (ID + "struct A { x @0 :Text; y @0 :Text; }", "bad.capnp:2: Duplicate ordinal"),
    "no id": ("struct A { x @0 :Text; }", "bad.capnp"),
    "empty": ("", "bad.capnp"),
    "binary": (bytes(range(256)) * 20, "bad.capnp"),
    "nul": (ID.encode() + b"\0" * 100, "bad.capnp"),
    "deep": (ID + "struct A { x @0 :" + "List(" * 3000 + "Bool" + ")" * 3000 + "; }", "bad.capnp"),
    "braces": (ID + "struct A {" * 20_000, "bad.capnp"),
    "cycle": (ID + "const a :UInt32 = .b; const b :UInt32 = .a;", "bad.capnp"),
    "self": (ID + "using A = .A; struct B { x @0 :A; }", "bad.capnp"),
    "embed": (ID + 'const x :Data = embed "/etc/shadow-nope";', "bad.capnp"),
    "inherits itself": (ID + "interface A extends(A) {}", "bad.capnp"),
    "two methods": (
        ID + "interface A { go @0 (); } interface B { go @0 (); } interface C extends(A, B) {}",
        "C inherits two different methods 'go'",
    ),
    "python names": (ID + "interface A { goOn @0 (); goON @1 (); }", "the same name in Python"),
    "two names of one call": (
        WW + "interface A { go @0 (a :Text $Ww.name, b :Text $Ww.name); }",
        "A.go has $Ww.name on 'a' and 'b'",
    ),
    "names of two kinds": (
        WW + "interface A { b @0 (b :Text $Ww.name) -> (b :B); }"
        "interface B { a @0 (a :Text $Ww.name); }",
        "A leads to $Ww.name on 'b' of A.b and on 'a' of B.a: what NAME is cannot be told",
    ),
    "a name in a struct": (
        WW + "interface A { go @0 (in :List(S)); } struct S { x :group { n @0 :Text $Ww.name; } }",
        "A.go has $Ww.name on 'n' within a parameter",
    ),
    "a list as a name": (WW + "interface A { go @0 (a :List(Text) $Ww.name); }", "is a list"),
    "an object as a name": (WW + "interface A { go @0 (a :A $Ww.name); }", "neither text nor"),
    "two interfaces of one name": (
        WW + 'using B = import "other.capnp"; interface A { go @0 () -> (b :B.A); }',
        "A leads to two interfaces 'A'",
    ),
    "python params": (ID + "interface A { go @0 (aUrl :Text, aURL :Text); }", "the same name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_schema_is_an_error(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    path = write(tmp_path / "folder-name", text)
    write(tmp_path / "folder-name", "@0xb8f1e0a2c3d4e501; interface A {}", "other.capnp")
    with pytest.raises(SchemaError) as caught:
        rpc.load(path)
    error = caught.value
    assert message in error.message
    assert "folder-name" not in error.message
    assert "\n" not in error.message
    assert len(error.message) < 700
    assert error.hint
    assert error.exit_code == 78


def test_what_is_not_a_schema_file(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "missing.capnp", "missing.capnp: there is no such schema file"),
        (tmp_path, "is not a file"),
        (write(tmp_path, ID, "schema.txt"), "ends with .capnp"),
        (Path("a\0b.capnp"), "no such schema file"),
        (write(tmp_path, ID + "#" * (1 << 20), "huge.capnp"), "larger than 1048576 bytes"),
    ):
        with pytest.raises(SchemaError, match=message):
            rpc.load(path)
    loop = tmp_path / "loop.capnp"
    loop.symlink_to(loop)
    with pytest.raises(SchemaError):
        rpc.load(loop)
    if os.geteuid() != 0:
        secret = write(tmp_path, ID, "secret.capnp")
        secret.chmod(0)
        with pytest.raises(SchemaError, match="cannot be read"):
            rpc.load(secret)


def test_too_many_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SCHEMA_FILES_MAX", 3)
    for i in range(5):
        write(tmp_path, f'@0xb8f1e0a2c3d4e50{i};\nusing X = import "{i + 1}.capnp";', f"{i}.capnp")
    with pytest.raises(SchemaError, match="more than 3 files"):
        rpc.load(tmp_path / "0.capnp")


def test_imports_in_a_circle(tmp_path: Path) -> None:
    write(
        tmp_path,
        '@0xb8f1e0a2c3d4e501;\nusing B = import "b.capnp"; struct A { b @0 :B.B; }',
        "a.capnp",
    )
    write(
        tmp_path,
        '@0xb8f1e0a2c3d4e502;\nusing A = import "a.capnp"; struct B { a @0 :A.A; }',
        "b.capnp",
    )
    assert rpc.load(tmp_path / "a.capnp").interfaces == {}


def test_a_check_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(compiler, "_CHECK", slow)
    monkeypatch.setattr(compiler, "CHECK_S", 0.2)
    with pytest.raises(SchemaError, match="took longer"):
        rpc.load(write(tmp_path, ID))


def test_what_passed_is_not_checked_again(
    tmp_path: Path, cache: Path, checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(tmp_path, "@0xb8f1e0a2c3d4e501;\nstruct S { x @0 :Text; }", "other.capnp")
    path = write(tmp_path, ID + 'using O = import "other.capnp"; interface I { go @0 O.S; }')
    rpc.load(path)
    assert len(checks) == 1
    (mark,) = cache.iterdir()
    assert (mark.stat().st_size, mark.stat().st_mode & 0o777) == (0, 0o600)
    monkeypatch.setattr(compiler, "_loaded", {})
    rpc.load(path)
    assert len(checks) == 1
    other.write_text(other.read_text() + "# changed")
    rpc.load(path)
    assert len(checks) == 2
    path.write_text(path.read_text() + "# changed")
    rpc.load(path)
    assert len(checks) == 3
    path.write_text(ID + "oops")
    for count in (4, 5):  # a failure is not remembered
        with pytest.raises(SchemaError):
            rpc.load(path)
        assert len(checks) == count
    monkeypatch.setattr(compiler.capnp, "__version__", "0.0.0")
    monkeypatch.setattr(compiler, "_loaded", {})
    path.write_text(ID)
    rpc.load(path)
    assert len(checks) == 6


def test_a_cache_that_cannot_be_used(
    tmp_path: Path, checks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, ID)
    blocked = write(tmp_path, "", "file")
    for cache_home in (str(blocked), "/proc/nope", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
        monkeypatch.setenv("HOME", str(blocked))
        monkeypatch.setattr(compiler, "_loaded", {})
        assert rpc.load(path).interfaces == {}
    assert len(checks) == 3


def test_two_files_with_one_id(tmp_path: Path) -> None:
    """A plugin's schema that claims another one's ID must neither abort nor replace it."""
    zoo = Path(__file__).with_name("zoo.capnp").read_text()
    clash = rpc.load(write(tmp_path, zoo.replace("nothing @2", "nichts @2"), "clash.capnp"))
    assert "nichts" in clash.Zoo.methods
    assert "nothing" in rpc.load(Path(__file__).with_name("zoo.capnp")).Zoo.methods


def test_servants_are_checked_when_they_are_defined(schema: rpc.Schema) -> None:
    with pytest.raises(TypeError, match=r"Missing\.set is missing: define `async def set\(self, v"):

        class Missing(rpc.Servant, interface=schema.Cell):
            async def get(self) -> Any: ...

    with pytest.raises(TypeError, match=r"Sync\.get must be `async def`"):

        class Sync(rpc.Servant, interface=schema.Cell):
            def get(self) -> Any: ...

            async def set(self, value: bytes) -> None: ...

    with pytest.raises(TypeError, match=r"Names\.set lacks the parameter value of Cell\.set"):

        class Names(rpc.Servant, interface=schema.Cell):
            async def get(self) -> Any: ...

            async def set(self, val: bytes = b"") -> None: ...

    with pytest.raises(TypeError, match=r"More\.get wants extra, which Cell\.get has not"):

        class More(rpc.Servant, interface=schema.Cell):
            async def get(self, extra: int) -> Any: ...

            async def set(self, value: bytes) -> None: ...

    class Base(rpc.Servant):
        async def get(self) -> Any: ...

    class Good(Base, interface=schema.Cell):
        async def set(self, *, value: bytes, extra: int = 0) -> None: ...

    class Better(Good):
        async def get(self, **_: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"Worse\.set is missing"):

        class Worse(Good):
            set = None  # type: ignore[assignment]


def test_importing_wetware_imports_no_pycapnp() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import wetware, sys; print('capnp' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
