"""Admission on a disk that is full to the last byte: what ends something is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from wetware.base.disk import RESERVED_BYTES, RESERVED_FILE
from wetware.errors import AdmissionRefused, WetwareError
from wetware.identity import Key
from wetware.overlay.admission.store import Store

pytestmark = pytest.mark.anyio


async def founder(cluster: Any, small_disk: Any) -> Any:
    directory = small_disk.path / "n"
    directory.mkdir(mode=0o700)
    return await cluster.founder(data_dir=directory)


def crashed(node: Any, to: Path) -> Path:
    shutil.copytree(node.data_dir, to)
    return to


async def test_an_eviction_and_a_withdrawn_ticket_are_on_a_full_disk(
    small_disk: Any, cluster: Any, tmp_path: Path
) -> None:
    a = await founder(cluster, small_disk)
    b = await cluster.join(await a.ticket())
    second, first = await a.ticket(), await a.issuer.invite(uses=50)
    small_disk.fill()
    for _ in range(20):  # what gives something is refused, and leaves the reserve alone
        with pytest.raises(AdmissionRefused, match="No space left"):
            await a.issuer.redeem(Key.generate().peer_id, second.secret)
        with pytest.raises(AdmissionRefused, match="No space left"):
            await a.issuer.invite()
    assert (a.data_dir / RESERVED_FILE).stat().st_size == RESERVED_BYTES
    await a.issuer.evict(b.peer_id)
    await a.issuer.revoke_ticket(first.id)
    assert not small_disk.free_bytes
    after = Store(crashed(a, tmp_path / "copy"))
    assert list(after.facts.tombstones) == [b.peer_id]
    assert after.tickets[first.id].revoked
    assert not after.files.unsure
    assert not list(a.data_dir.glob(".t*")), "no half of a file is left"


async def test_where_the_reserve_is_gone_too_nobody_gets_in_after_a_crash(
    small_disk: Any, cluster: Any, tmp_path: Path
) -> None:
    a = await founder(cluster, small_disk)
    b = await cluster.join(await a.ticket())
    ticket = await a.issuer.invite()
    with a.admission.store.files.reserve.open():
        small_disk.fill()
    with pytest.raises(AdmissionRefused) as refused:
        await a.issuer.revoke_ticket(ticket.id)
    assert refused.value.code == "admission.not_saved"
    copy = crashed(a, tmp_path / "copy")
    small_disk.free()
    await a.issuer.revoke_ticket(ticket.id)
    assert not a.admission.store.files.reserve.marked
    await a.stop()

    again = cluster.member(a.key, data_dir=copy)
    await again.open_host()
    await again.start(Store(copy))
    for _ in range(2):
        with pytest.raises(WetwareError) as refused:
            await again.issuer.redeem(Key.generate().peer_id, ticket.secret)
        assert refused.value.code == "admission.not_durable"
        with pytest.raises(WetwareError) as refused:
            await again.issuer.renew(b.peer_id, b.admission.own.encoded)
        assert refused.value.code == "admission.not_durable"
        await again.issuer.revoke_ticket(ticket.id)  # ends go on, and are no look
    again.admission.store.files.confirm()
    await again.issuer.renew(b.peer_id, b.admission.own.encoded)
    assert not Store(copy).files.unsure


async def test_a_start_without_room_for_a_reserve_leaves_no_empty_file(
    small_disk: Any, cluster: Any
) -> None:
    a = await founder(cluster, small_disk)
    await a.stop()
    (a.data_dir / RESERVED_FILE).unlink()
    small_disk.fill()
    store = Store(a.data_dir)
    assert "No space left" in store.files.reserve.missing
    assert not (a.data_dir / RESERVED_FILE).exists()
    small_disk.free()
    await store.tickets.file.save("nothing")
    assert not store.files.reserve.missing
