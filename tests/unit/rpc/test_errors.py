"""What goes wrong on one side reaches the other as code, message and hint, and nothing more."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import (
    Denied,
    Disconnected,
    InternalError,
    Unsupported,
    WetwareError,
)
from wetware.rpc.wire import MESSAGE_CHARS_MAX, WireError, from_kj, to_wire

pytestmark = pytest.mark.anyio


async def test_a_wetware_error_comes_back_as_itself(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(Denied) as caught:
            await zoo.fail(how="denied")
    error = caught.value
    assert (error.code, error.message, error.hint) == (
        "capability.denied",
        "no grant covers it",
        "ask the operator",
    )
    assert error.__cause__ is None
    assert error.__context__ is None


async def test_an_unknown_code_survives(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(WetwareError) as caught:
            await zoo.fail(how="code")
    assert (caught.value.code, caught.value.message) == ("peculiar.code", "peculiar")


async def test_a_defect_is_logged_here_and_shows_nothing_there(
    serving: Any, servants: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(servants.Zoo()) as zoo:
        with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
            await zoo.fail(how="bug")
        text = f"{caught.value!r} {caught.value.hint} {caught.value.code}"
        for leak in ("do-not-send-this", "ValueError", "Traceback", ".py", "/"):
            assert leak not in text
        (record,) = [r for r in caplog.records if r.getMessage() == "rpc.defect"]
        assert record.ww["id"] in caught.value.message  # type: ignore[attr-defined]
        assert record.exc_info is not None
        assert "do-not-send-this" in str(record.exc_info[1])


async def test_nothing_but_the_three_texts_is_on_the_wire(
    serving: Any, servants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at in the bytes themselves, whatever a client would make of them."""
    sent: list[bytes] = []
    from wetware.rpc.transport import RpcTransport

    write = RpcTransport.write
    monkeypatch.setattr(
        RpcTransport, "write", lambda self, data: (sent.append(bytes(data)), write(self, data))
    )
    async with serving(servants.Zoo()) as zoo:
        for how in ("bug", "denied", "cancelled"):
            with pytest.raises(WetwareError):
                await zoo.fail(how=how)
        with pytest.raises(TypeError):
            await zoo.data(data="text")
    everything = b"".join(sent)
    assert b"no grant covers it" in everything
    for leak in (b"Traceback", b".py", b"do-not-send-this", b"/usr", b"/home", b"line "):
        assert leak not in everything


async def test_an_error_for_a_caller_that_is_gone_is_nobody_s(
    serving: Any, servants: Any, schema: rpc.Schema, tools: Any
) -> None:
    """Nor is it printed where the servant runs; what else the loop has to say still is."""
    said: list[Any] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: said.append(context.get("exception")))

    class Late(servants.Zoo, interface=schema.Zoo):  # type: ignore[misc]
        async def hang(self) -> None:
            try:
                await super().hang()
            except asyncio.CancelledError:
                raise Denied("too late") from None

    try:
        servant = Late()
        async with serving(servant) as zoo:
            call = asyncio.ensure_future(zoo.hang())
            await tools.until(lambda: servant.running)
            call.cancel()
            await tools.until(lambda: servant.cancelled and not servant.running)
            await zoo.nothing()
            other = ValueError("of somebody else")
            loop.call_exception_handler({"message": "", "exception": other})
            assert said == [other]
        loop.call_exception_handler({"message": "", "exception": other})
        assert said == [other, other], "the handler is the one of before"
    finally:
        loop.set_exception_handler(before)


async def test_a_servant_that_cancels_itself_is_an_error(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(InternalError):
            await zoo.fail(how="cancelled")
        assert await zoo.nothing() is None


async def test_awkward_text_is_sent_all_the_same(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(Denied) as caught:
            await zoo.fail(how="surrogate")
        assert caught.value.message.startswith("a?b c")
        assert len(caught.value.message) == MESSAGE_CHARS_MAX
        assert await zoo.nothing() is None


async def test_results_that_do_not_fit_the_schema_are_a_defect(
    serving: Any, servants: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Bad(servants.Zoo):  # type: ignore[misc, name-defined]
        async def data(self, data: bytes, name: str) -> Any:
            return {"text": {"data": 5}, "key": {"dta": b""}, "list": [1], "none": None}[name]

        async def nothing(self) -> Any:
            return {"surprise": 1}

    async with serving(Bad()) as zoo:
        for name in ("text", "key", "list"):
            with pytest.raises(InternalError):
                await zoo.data(name=name)
        with pytest.raises(InternalError):
            await zoo.nothing()
        assert await zoo.data(name="none") == {"data": b""}
    assert len([r for r in caplog.records if r.getMessage() == "rpc.defect"]) == 4


async def test_a_method_that_the_peer_lacks(
    serving: Any, servants: Any, schema: rpc.Schema
) -> None:
    async with serving(servants.Zoo()) as zoo:
        newer = zoo.cast(schema.Newer)
        with pytest.raises(Unsupported) as caught:
            await newer.extra()
        assert "Newer.extra" in caught.value.message


async def test_a_lost_connection(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        hanging = asyncio.create_task(zoo.hang())
        await zoo.nothing()
        zoo._end.transport.abort()
        with pytest.raises(Disconnected, match=r"Zoo\.hang"):
            await hanging
        with pytest.raises(Disconnected):
            await zoo.nothing()
        assert zoo.closed


def test_wire_error_text_has_no_frames() -> None:
    import traceback

    try:
        raise to_wire(Denied("message", hint="hint"))
    except WireError as exc:
        text = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    assert text == "ww/1: capability.denied\x1fmessage\x1fhint\n"


@pytest.mark.parametrize(
    ("kind", "text", "cls"),
    [
        ("DISCONNECTED", "Peer disconnected.", Disconnected),
        ("UNIMPLEMENTED", "Method not implemented.", Unsupported),
        ("FAILED", "/home/somebody/secret.c++:12: failed", InternalError),
        ("FAILED", "Traceback\n ww/1: code\x1fmessage\x1fhint", InternalError),
        ("FAILED", "remote exception: ww/1: \x1f\x1f", WetwareError),
        ("FAILED", "remote exception: ww/1: auth.x\x1fno", WetwareError),
        ("SOMETHING", "", InternalError),
    ],
)
def test_foreign_errors(kind: str, text: str, cls: type[WetwareError]) -> None:
    class Foreign(Exception):
        type = kind
        description = text

    error = from_kj(Foreign(), "Zoo.data")
    assert isinstance(error, cls)
    assert "secret" not in error.message
