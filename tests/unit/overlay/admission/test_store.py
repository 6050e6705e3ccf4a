"""The files: what survives, what is damaged, what a text looks like."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from wetware import identity
from wetware.base.multiaddr import Multiaddr
from wetware.errors import ConfigError, InvalidArgument, KeyFileError
from wetware.identity import Key
from wetware.overlay.admission.files import File, Files
from wetware.overlay.admission.statements import Founding
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import Bundle, Ticket, parse_join

pytestmark = pytest.mark.anyio

FILES = [
    "cluster.json",
    "tickets.json",
    "ledger.json",
    "tombstones.json",
    "foreign.json",
]


async def filled(cluster: Any) -> Path:
    """The data directory of an issuer with one of everything."""
    a = await cluster.founder()
    await cluster.join(await a.ticket())
    await a.issuer.certify(Key.generate().peer_id, foreign=True)
    await a.issuer.evict(Key.generate().peer_id)
    await a.stop()
    path: Path = a.data_dir
    return path


async def test_everything_is_there_again_and_private(cluster: Any) -> None:
    path = await filled(cluster)
    check_files(path)


def check_files(path: Path) -> None:
    assert {*FILES, "certificate", "cluster.key"} <= {p.name for p in path.iterdir()}
    store = Store(path)
    assert store.founding is not None
    assert store.cluster_key is not None
    assert store.cluster_key.public == store.founding.public
    assert (len(store.tickets), len(store.ledger)) == (1, 1)
    assert (len(store.facts.tombstones), len(store.facts.foreign)) == (1, 1)
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_damaged_files_stop_the_node_with_a_remedy(cluster: Any) -> None:
    path = await filled(cluster)
    for name in FILES:
        file = path / name
        good = file.read_bytes()
        middle = len(good) // 2
        for bad in (
            b"",
            good[:middle],
            b"\0" * len(good),
            good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            good.replace(b'"version": 1', b'"version": 9'),
            b"[" * 100_000,
            b"[]",
        ):
            file.write_bytes(bad)
            with pytest.raises(ConfigError) as exc:
                Store(path)
            assert exc.value.code == "config.damaged", (name, bad[:40])
            assert name in exc.value.message
            assert exc.value.hint
            assert file.read_bytes() == bad, "never silently replaced"
        file.write_bytes(good)
    Store(path)


async def test_a_damaged_certificate_stops_the_node(cluster: Any) -> None:
    from wetware.overlay.admission.decision import Admission

    path = await filled(cluster)
    (path / "certificate").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="certificate is damaged") as exc:
        Admission(Store(path), Key.generate(), clock=cluster.clock)
    assert "--join" in exc.value.hint
    (path / "certificate").write_bytes(b"x" * 5000)
    with pytest.raises(ConfigError, match="damaged"):
        Store(path)


async def test_a_damaged_join_document_stops_the_node(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.stop()
    (b.data_dir / "join_document").write_bytes(b"changed")
    with pytest.raises(ConfigError, match="join_document is damaged"):
        Store(b.data_dir)
    (b.data_dir / "join_document").unlink()
    with pytest.raises(ConfigError, match="it is gone"):
        Store(b.data_dir)


def test_founding_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    founding = store.found("local", b"operator")
    (tmp_path / "cluster.json").unlink()  # the crash came between the two files
    again = Store(tmp_path)
    assert again.founding is None
    assert again.found("local", b"operator") == founding
    with pytest.raises(ConfigError, match="belongs to the cluster"):
        again.found("local", b"operator")


def test_a_lost_founding_is_not_founded_anew(tmp_path: Path) -> None:
    (tmp_path / "certificate").write_bytes(b"of a cluster")
    with pytest.raises(ConfigError, match="is gone") as exc:
        Store(tmp_path).found("local", b"operator")
    assert "--join" in exc.value.hint


def test_a_cluster_key_of_another_cluster(tmp_path: Path) -> None:
    Store(tmp_path).found("local", b"operator")
    (tmp_path / "cluster.key").unlink()
    Key.generate().save(tmp_path / "cluster.key")
    with pytest.raises(ConfigError, match="is not the key of the cluster"):
        Store(tmp_path)
    (tmp_path / "cluster.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="readable by others"):
        Store(tmp_path)


def test_an_encrypted_cluster_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    Store(tmp_path).found("local", b"operator")
    assert Store(tmp_path).cluster_key is not None
    monkeypatch.delenv("WW_PASSPHRASE")
    with pytest.raises(KeyFileError, match="passphrase"):
        Store(tmp_path)


async def test_writes_that_wait_share_one_and_see_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, written = Files(tmp_path), []
    write = identity.replace_private_file

    def counting(path: Path, data: bytes) -> None:
        written.append(data)
        write(path, data)

    monkeypatch.setattr("wetware.base.disk.replace_private_file", counting)
    value = 0
    file = File(files, "file", lambda: value)

    async def save(n: int) -> None:
        nonlocal value
        value = n
        await file.save("the number")
        assert json.loads((tmp_path / "file").read_bytes())["data"] >= n

    await asyncio.gather(*(save(n) for n in range(20)))
    assert json.loads((tmp_path / "file").read_bytes())["data"] == 19
    assert len(written) <= 3
    await files.flush()


async def test_a_write_in_the_background_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wetware.overlay.admission.files.RETRY_S", 0.01)
    files, fails = Files(tmp_path), [3]
    write = identity.replace_private_file

    def flaky(path: Path, data: bytes) -> None:
        if fails[0]:
            fails[0] -= 1
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr("wetware.base.disk.replace_private_file", flaky)
    File(files, "file", lambda: "x").save_soon()
    async with asyncio.timeout(60):
        while not (tmp_path / "file").exists():
            await asyncio.sleep(0.005)
    await files.flush()
    assert [r.getMessage() for r in caplog.records] == ["admission.not_saved"] * 3


# --- texts ----------------------------------------------------------------------------------------


def ticket() -> Ticket:
    issuer = Key.from_seed(b"i" * 32).peer_id
    return Ticket(
        founding=Founding(b"p" * 32, "local", b"operator"),
        issuer=issuer,
        addrs=(Multiaddr.parse(f"/ip4/192.0.2.1/tcp/4001/p2p/{issuer}"),),
        secret=b"s" * 32,
        not_after_ms=1_800_000_000_000,
    )


def test_a_ticket_there_and_back() -> None:
    text = ticket().text
    assert text.startswith("wwt1")
    assert len(text) < 400
    assert Ticket.parse(f"  {text}\n") == ticket()
    assert parse_join(text) == ticket()
    assert "ssss" not in repr(ticket())


def test_a_ticket_that_lost_something_is_called_that() -> None:
    text = ticket().text
    for bad in (text[:-1], text[:-7], text[:50] + text[51:], text[:60] + "A" + text[61:], "wwt1"):
        if bad == text:
            continue
        with pytest.raises(InvalidArgument, match="not a ticket") as exc:
            Ticket.parse(bad)
        assert exc.value.code == "invalid.ticket"
        assert exc.value.hint
        assert "ssss" not in exc.value.message
    for bad in ("", "ww1abc", "wwt1" + "A" * 20_000, "wwt1ä"):
        with pytest.raises(InvalidArgument):
            parse_join(bad)
    with pytest.raises(InvalidArgument, match="not a bundle"):
        parse_join("wwc1AAAA")


async def test_a_bundle_there_and_back(cluster: Any) -> None:
    a = await cluster.founder()
    made = await a.issuer.certify(Key.generate().peer_id, addrs=[a.addr])
    bundle = parse_join(made.text)
    assert isinstance(bundle, Bundle)
    assert bundle == made
    other = Founding(a.admission.founding.public, "local", b"another operator")
    with pytest.raises(InvalidArgument, match="cluster"):
        Bundle.parse(Bundle(other, made.chain).text)


def test_every_part_of_the_founding_names_the_cluster() -> None:
    ids = {
        Founding(public, backend, statement).cluster_id
        for public in (b"a" * 32, b"b" * 32)
        for backend, statement in (("local", b"x"), ("evm", b"x"), ("local", b"y"), ("localx", b""))
    }
    assert len(ids) == 8
    assert all(len(each) == 40 for each in ids)
    for bad in ((b"short", "local", b""), (b"a" * 32, "Local!", b""), (b"a" * 32, "x", b"y" * 600)):
        with pytest.raises(InvalidArgument):
            Founding(*bad)


def test_importing_the_package_costs_no_cryptography() -> None:
    import subprocess
    import sys

    script = (
        "import wetware.overlay.admission, wetware.overlay.admission.limits, sys;"
        "assert not {'cryptography', 'cbor2', 'asyncio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
