"""Functions that travel: what can, what they are given, and what comes back."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import pytest

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware_proc import functions
from wetware_proc.functions import CallEnded, FunctionFailed, function, packed_arguments, result

VALUE = 1


def plain(a: int, b: int = 2) -> int:
    import math

    def inner(x: int) -> int:
        return math.floor(x) + len(str(b))

    return inner(a) if a else plain(a + 1)


def test_a_function_travels_as_its_source_at_its_own_lines() -> None:
    travels = function(plain)
    assert travels.name == "test_functions.py:plain"
    lines = travels.program.decode().splitlines()
    first = plain.__code__.co_firstlineno
    assert lines[first - 1].startswith("def plain(")
    assert not any(lines[: first - 1])
    assert lines[-1] == "__import__('ww')._serve(plain)"


def test_a_decorator_stays_behind() -> None:
    def decorator(call: Any) -> Any:
        return call

    @decorator
    def decorated() -> int:
        return 1

    lines = function(decorated).program.decode().splitlines()
    assert lines[decorated.__code__.co_firstlineno].strip() == "def decorated() -> int:"
    assert "@" not in "".join(lines)


def test_what_needs_more_than_its_source_is_refused() -> None:
    local = 1

    def closure() -> int:
        return local

    def module() -> object:
        return [json.dumps(VALUE) for _ in range(2)]

    async def coroutine() -> None: ...

    def generator() -> Any:
        yield 1

    for call, why in (
        (closure, "`local` of the function around it"),
        (module, "`VALUE`, `json` of the module around it"),
        (coroutine, "a coroutine or a generator"),
        (generator, "a coroutine or a generator"),
        (lambda: 1, "defined with `def`"),
        (len, "defined with `def`"),
        (FunctionFailed, "defined with `def`"),
    ):
        with pytest.raises(InvalidArgument, match=why) as refused:
            function(call)
        assert refused.value.code == "invalid.function"
    scope: dict[str, Any] = {}
    exec("def made(): pass", scope)  # noqa: S102 - of a notebook, say
    with pytest.raises(InvalidArgument, match="no source"):
        function(scope["made"])


def wheel(**files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        for name, text in files.items():
            made.writestr(name.replace("__dot__", "."), text)
    return data.getvalue()


def test_packages_travel_with_it() -> None:
    wheels = (wheel(one__dot__py="1"), wheel(two__dot__py="2"))
    packed = function(plain, wheels).program
    with zipfile.ZipFile(io.BytesIO(packed)) as found:
        assert found.namelist() == ["__main__.py", "one.py", "two.py"]
        assert found.read("__main__.py") == function(plain).program
    function.cache_clear()
    assert packed == function(plain, wheels).program, "a node knows it again"
    with pytest.raises(InvalidArgument, match=r"machine code fast\.so"):
        function(plain, (wheel(fast__dot__so=""),))
    with pytest.raises(InvalidArgument, match="no wheel"):
        function(plain, (b"PK",))


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, {1, 2}, 2**64, -(2**70), [[1j]], range(3), float]
)
def test_what_is_no_plain_data_does_not_travel(value: object) -> None:
    with pytest.raises(InvalidArgument):
        packed_arguments([value])


def test_what_is_too_deep_does_not_travel() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidArgument):
        packed_arguments([deep])


def test_what_comes_back_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert result(cbor.encode([True, {"a": [1, b"2"]}])) == {"a": [1, b"2"]}
    assert result(cbor.encode([True, [cbor.Tag(39, 1)]])) == [cbor.Tag(39, 1)]
    with pytest.raises(FunctionFailed) as failed:
        result(cbor.encode([False, "Traceback\n  File\nValueError: no\n"]))
    assert failed.value.message == "ValueError: no"
    assert failed.value.traceback.startswith("Traceback")
    for data in (
        b"hello",
        cbor.encode([True]),
        cbor.encode([1, 2, 3]),
        cbor.encode([False, 1]),
        cbor.encode([True, cbor.Tag(0, "2013-03-21T20:04:00Z")]),
        cbor.encode([True, cbor.Tag(39, "x")]),
        cbor.encode([True, 1]) + b"\0",
        b"\x81" * 100_000,
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
    ):
        with pytest.raises(CallEnded):
            result(data)
    monkeypatch.setattr(functions, "VALUE_BYTES_MAX", 10)
    with pytest.raises(CallEnded, match="at most 10"):
        result(cbor.encode([True, "x" * 20]))
