"""Ctrl-C ends a command at once, wherever it waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from wetware import client
from wetware.cli import app
from wetware.client.session import Opening
from wetware.identity import Key
from wetware.testing import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


@pytest.fixture
def terminal() -> Iterator[int]:
    """A descriptor that is a terminal; nobody types."""
    master, slave = pty.openpty()
    yield slave
    os.close(slave)
    os.close(master)


def _encrypted_key(home: Home) -> Path:
    path = home.path / ".wetware" / "keys" / "default"
    path.parent.mkdir(parents=True, mode=0o700)
    Key.generate().save(path, passphrase="secret")
    return path


@pytest.mark.parametrize("ignored", [False, True])
def test_processes_of_a_home_can_be_interrupted(home: Home, ignored: bool) -> None:
    """Tests that run as a background job of a script ignore SIGINT, and their children would."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        process = home.start_ww("--help")
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    status = Path(f"/proc/{process.pid}/status").read_text()  # it is not reaped yet
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    assert not int(mask, 16) & 1 << (signal.SIGINT - 1)
    assert after is (signal.SIG_IGN if ignored else signal.default_int_handler)


def test_ctrl_c_at_the_passphrase_prompt(home: Home, terminal: int) -> None:
    _encrypted_key(home)
    ww = home.start_ww("whoami", stdin=terminal, start_new_session=True)
    assert ww.stderr is not None
    said = ""
    while "Passphrase:" not in said:
        char = ww.stderr.read(1)
        assert char, said
        said += char
    ww.send_signal(signal.SIGINT)
    _, rest = ww.communicate(timeout=60)
    assert ww.returncode == 130
    assert "Traceback" not in rest


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_passphrase_is_asked_before_the_login(
    home: Home, terminal: int, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    """Once, if the key needs one, and not while the loop runs and the node waits."""
    path = _encrypted_key(home)
    if not encrypted:
        path.unlink()
        Key.generate().save(path)
    asked: list[str] = []

    def getpass(prompt: str) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        asked.append(prompt)
        return "secret"

    @contextlib.asynccontextmanager
    async def connect(
        target: str | None,
        *,
        context: object,
        key: str | None,
        passphrase: Callable[[], str],
        reconnect: object,
    ) -> AsyncIterator[types.SimpleNamespace]:
        choice = client.KeyChoice(key, path.parent, passphrase)
        yield types.SimpleNamespace(notice="", keys=(choice.load(), choice.load()))

    async def work(session: types.SimpleNamespace) -> bool:
        one, two = session.keys
        return bool(one.public == two.public)

    monkeypatch.setenv("WW_HOME", str(home.path / ".wetware"))
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    monkeypatch.delenv("WW_KEY", raising=False)
    monkeypatch.setattr("getpass.getpass", getpass)
    monkeypatch.setattr(client, "connect", connect)
    with open(terminal, closefd=False) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert app.run_client(work)  # type: ignore[arg-type]
    assert len(asked) == encrypted


@pytest.mark.anyio
async def test_an_opening_that_was_cancelled_is_begun_afresh() -> None:
    """It is shared: the cancellation of the first must not become that of whoever comes later."""
    calls = 0

    async def call(method: str) -> str:
        return method

    async def open_service(name: str, interface: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return types.SimpleNamespace(call=call, closed=False)

    session = types.SimpleNamespace(open=open_service)
    opening = Opening(session, "chat", None)  # type: ignore[arg-type]
    first = asyncio.create_task(opening.call("join"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert opening._ref is not None
    opening._ref.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await opening.call("join") == "join"
    assert calls == 2
