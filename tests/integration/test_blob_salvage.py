"""A node whose index of blobs is damaged has all of its pins again, by its own files and others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import wetware
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

PAGE = 4096
BLOCKS, SMALL = 3, 6
"""Pages that lead to the rows of blocks, and to the bytes of the small ones."""


async def local(node: NodeProcess, cid: str) -> bytes:
    async with (
        wetware.connect(node.addr, key=node.home.key()) as session,
        session.blob.open(cid, local=True) as blob,
    ):
        return await blob.read()


@pytest.mark.long
async def test_every_pin_of_a_node_whose_index_is_damaged_is_whole_again(tmp_path: Path) -> None:
    datas = [os.urandom(size) for size in (10, 20_000, 3_000_000)]
    with Home(tmp_path, libp2p=False) as home, home.node("a") as a:
        with home.node("b", join=a) as b:
            b.wait_members([a.peer_id])
            cids = []
            async with wetware.connect(a.addr, key=home.key()) as session:
                for data in datas:
                    cids.append((await session.blob.put(data)).cid)
            async with wetware.connect(b.addr, key=home.key()) as session:
                for cid in cids:
                    await session.blob.pin(cid)
        (path,) = b.data_dir.glob("**/index.db")
        index = bytearray(path.read_bytes())
        for page in (BLOCKS, SMALL):
            index[(page - 1) * PAGE] ^= 255
        path.write_bytes(index)
        with home.node("b") as b:
            b.wait_members([a.peer_id])
            b.wait_log("blob.index_salvaged")
            found = b.ww("doctor", "--json")
            assert "blob.index" in found.stdout
            with pytest.raises(wetware.errors.WetwareError):
                await local(b, cids[0])
            verified = b.ww("blob", "verify", "--json")
            said = [json.loads(line) for line in verified.stdout.splitlines()]
            assert verified.returncode == 0, verified
            assert len(said) > 2, verified
            for cid, data in zip(cids, datas, strict=True):
                assert await local(b, cid) == data
            async with wetware.connect(b.addr, key=home.key()) as session:
                assert {pin.root for pin in await session.blob.pins()} == set(cids)
