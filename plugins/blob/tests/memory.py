"""The service as the schema has it, in memory: what the client and the commands are tested with.

A tree is bytes (a file), a str (where a link leads), or a dict or a list of pairs (a directory),
whose names may be any.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio

from wetware import rpc
from wetware.errors import InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware.rpc.wire import fresh
from wetware_blob.client import BlobStore
from wetware_blob.format import build, car, dagpb, unixfs
from wetware_blob.format.cid import DAG_PB, Block, Cid
from wetware_blob.format.read import Get, entries, read, stat, tree
from wetware_blob.schema import SCHEMA

Tree = Any


class Bytes(anyio.abc.ByteStream):
    """What is sent can be received, at most `most` bytes at a time."""

    def __init__(self, data: bytes = b"", most: int = 1 << 20) -> None:
        self.data, self._at, self._most = bytearray(data), 0, most

    async def receive(self, max_bytes: int = 65536) -> bytes:
        count = min(max_bytes, self._most)
        got = bytes(self.data[self._at : self._at + count])
        self._at += len(got)
        if not got:
            raise anyio.EndOfStream
        return got

    async def send(self, item: bytes) -> None:
        self.data += item

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


def blocks_of(tree: Tree) -> Iterator[Block]:
    """The blocks of a tree, each above those that it leads to, and as often as it is led to."""
    if isinstance(tree, bytes):
        file, below, size = build.FileTree(build.V1_2025), list[Block](), build.V1_2025.chunk_bytes
        for at in range(0, len(tree) or 1, size):
            block = build.leaf(build.V1_2025, tree[at : at + size])
            below.append(block)
            assert not file.add(block.cid, len(block.data), len(block.data))
        yield from reversed(file.finish()[1])
        yield from below
    elif isinstance(tree, str):
        said = unixfs.UnixFs(unixfs.Type.SYMLINK, tree.encode())
        yield _node([], said)
    else:
        links, parts = [], []
        for name, part in pairs(tree):
            parts.append(list(blocks_of(part)))
            links.append(dagpb.Link(bytes(parts[-1][0].cid), name.encode(), 0))
        links.sort(key=lambda link: (isinstance(tree, dict) and link.name) or b"")
        yield _node(links, unixfs.UnixFs(unixfs.Type.DIRECTORY))
        for blocks in parts:
            yield from blocks


def _node(links: list[dagpb.Link], said: unixfs.UnixFs) -> Block:
    data = dagpb.encode(dagpb.Node(tuple(links), unixfs.encode(said)))
    return Block(Cid.of(DAG_PB, data), data)


def car_of(tree: Tree) -> bytes:
    root, *below = blocks_of(tree)
    sections = map(car.section, (root, *below))
    return car.header(root.cid) + b"".join(sections)


def cid_of(tree: Tree) -> str:
    return str(next(blocks_of(tree)).cid)


async def tree_of(root: Cid, get: Get) -> Tree:
    found = await stat(root, get)
    if found.kind == "symlink":
        return found.data.decode()
    if found.kind == "file":
        return b"".join([piece async for piece in read(root, 0, None, get)])
    return {entry.name: await tree_of(entry.cid, get) async for entry in entries(root, get)}


def kind_of(tree: Tree) -> str:
    return {bytes: "file", str: "symlink"}.get(type(tree), "directory")


def size_of(tree: Tree) -> int:
    if isinstance(tree, dict | list):
        return sum(size_of(below) for _, below in pairs(tree))
    return len(tree)


def pairs(tree: Tree) -> list[tuple[str, Tree]]:
    return list(tree.items()) if isinstance(tree, dict) else tree


class Cluster:
    """All that there is, and what goes wrong."""

    def __init__(self) -> None:
        self.blobs: dict[str, Tree] = {}
        self.pins: list[dict[str, Any]] = []
        self.raw: set[str] = set()  # CIDs whose trees are sent whatever is in them
        self.quota = 1 << 40
        self.break_at = 1 << 60  # bytes of a stream, behind which it fails
        self.stall_at = 1 << 60  # …, behind which nothing comes any more
        self.reads: list[tuple[str, int]] = []  # method, start or skip
        self.sent = 0
        self.reached = asyncio.Event()  # stall_at
        self.live = 0  # transfers and blobs that are held
        self.put_calls: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = [{"what": "end", "blocks": 0}]
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, tree: Tree) -> str:
        cid = cid_of(tree)
        self.blobs[cid] = tree
        for _, below in pairs(tree) if isinstance(tree, dict | list) else ():
            self.add(below)
        return cid

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class _Limited:
    """A stream that breaks where the cluster says so."""

    def __init__(self, cluster: Cluster, stream: rpc.ByteStream) -> None:
        self.cluster, self.stream, self.at = cluster, stream, 0

    async def send(self, data: bytes) -> None:
        cluster = self.cluster
        for at in range(0, len(data), 1 << 16):
            part = data[at : at + (1 << 16)]
            if self.at + len(part) > min(cluster.break_at, cluster.stall_at):
                part = part[: max(min(cluster.break_at, cluster.stall_at) - self.at, 0)]
                await self.stream.send(part)
                self.at += len(part)
                if cluster.stall_at < cluster.break_at:
                    cluster.reached.set()
                    await asyncio.sleep(3600)
                # What has been sent is read before it breaks.
                await self.stream.aclose()
                raise WetwareError("broken on purpose")
            await self.stream.send(part)
            self.at += len(part)
            cluster.sent += len(part)


class Blob(rpc.Servant, interface=SCHEMA.Blob):
    def __init__(self, cluster: Cluster, cid: str) -> None:
        self.cluster, self.cid = cluster, cid
        cluster.live += 1

    def released(self) -> None:
        self.cluster.live -= 1

    @property
    def tree_(self) -> Tree:
        if self.cid not in self.cluster.blobs:
            raise NotFound(
                f"nobody has {self.cid}", hint="is it the right CID?", code="not_found.blob"
            )
        return self.cluster.blobs[self.cid]

    async def stat(self) -> dict[str, Any]:
        return {"size": size_of(self.tree_)}

    async def info(self) -> dict[str, Any]:
        return {"info": self.entry("", self.tree_)}

    def entry(self, name: str, tree: Tree) -> dict[str, Any]:
        kind = kind_of(tree)
        return {"name": name, "cid": cid_of(tree), "kind": kind, "size": size_of(tree)}

    def feed(self, work: Callable[[Any], Awaitable[None]]) -> dict[str, Any]:
        stream = rpc.ByteStream()

        async def run() -> None:
            try:
                await work(_Limited(self.cluster, stream))
                await stream.send_eof()
            except WetwareError as exc:
                stream.abort(exc)

        self.cluster.spawn(run())
        return {"stream": stream.servant}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        self.cluster.reads.append(("read", start))
        if not isinstance(self.tree_, bytes):
            raise InvalidArgument(f"{self.cid} is no file", code="invalid.not_a_file")
        return self.feed(lambda stream: stream.send(self.tree_[start:end]))

    async def ls(self, skip: int, limit: int) -> dict[str, Any]:
        if not isinstance(self.tree_, dict):
            raise InvalidArgument(f"{self.cid} is no directory", code="invalid.not_a_directory")
        names = list(self.tree_)[skip:]
        entries = [self.entry(name, self.tree_[name]) for name in names[: limit or 1000]]
        return {"entries": entries, "more": len(names) > len(entries)}

    async def at(self, path: str) -> dict[str, Any]:
        tree = self.tree_
        for name in filter(None, path.split("/")):
            if not isinstance(tree, dict) or name not in tree:
                raise NotFound(f"{self.cid} has no {name!r}")
            tree = tree[name]
        return {"blob": Blob(self.cluster, cid_of(tree)), "cid": cid_of(tree)}

    async def tree(self, skip: int, start: int, end: int) -> dict[str, Any]:
        self.cluster.reads.append(("tree", skip))
        if self.cid in self.cluster.raw and not skip:
            return self.feed(lambda stream: stream.send(car_of(self.tree_)))
        return self.feed(lambda stream: self.send_tree(stream, skip))

    async def send_tree(self, stream: _Limited, skip: int) -> None:
        blocks = {block.cid: block for block in blocks_of(self.tree_)}

        async def get(cid: Cid) -> bytes:
            await stream.send(car.section(blocks[cid]))
            return blocks[cid].data

        await stream.send(car.header(Cid.parse(self.cid)))
        async for _ in tree(Cid.parse(self.cid), get, skip=skip):
            pass

    async def car(self, start: int, end: int) -> dict[str, Any]:
        return self.feed(lambda stream: stream.send(car_of(self.tree_)))


class Transfer(rpc.Servant, interface=SCHEMA.Transfer):
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.state = {
            "done": False, "root": "", "bytes": 0, "total": 0, "copies": 0, "doing": "reading",
        }  # fmt: skip
        self.error: WetwareError | None = None
        self.ended = asyncio.Event()
        self.over = False
        cluster.live += 1

    async def progress(self, wait_s: float) -> dict[str, Any]:
        assert wait_s <= 25
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), wait_s)
        if self.error is not None:
            raise fresh(self.error)
        return {"state": self.state}

    def released(self) -> None:
        self.cluster.live -= 1
        self.over = True

    def end(self, root: str = "", copies: int = 1, error: WetwareError | None = None) -> None:
        self.error = None if error is None else fresh(error)
        self.state |= {"done": True, "root": root, "copies": copies, "doing": ""}
        self.ended.set()


class Store(rpc.Servant, interface=SCHEMA.Store):
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def open(self, cid: str, local: bool) -> dict[str, Any]:
        if not cid.startswith("b"):
            raise InvalidArgument(f"{cid!r} is no CID", code="invalid.cid")
        return {"blob": Blob(self.cluster, cid)}

    async def put(self, pin: Any, form: str, profile: str, bytes_max: int) -> dict[str, Any]:
        call = {"pin": pin, "form": form, "profile": profile, "bytes_max": bytes_max}
        self.cluster.put_calls.append(call)
        stream, transfer = rpc.ByteStream(run_sync=asyncio.to_thread), Transfer(self.cluster)
        self.cluster.spawn(self._take(stream, transfer, form, pin, bytes_max))
        return {"stream": stream.servant, "transfer": transfer}

    async def _take(
        self, stream: rpc.ByteStream, transfer: Transfer, form: str, pin: Any, bytes_max: int
    ) -> None:
        taken = bytearray()
        try:
            async for data in stream:
                taken += data
                transfer.state["bytes"] = len(taken)
                if len(taken) > min(bytes_max, self.cluster.quota):
                    code = "limit.blob_quota"
                    raise LimitExceeded("the quota is used up", hint="ww blob rm CID", code=code)
            if form == "file":
                tree: Tree = bytes(taken)
            else:
                reader = car.Reader()
                blocks = {block.cid: block.data for block in reader.feed(taken)}

                async def get(cid: Cid) -> bytes:
                    return blocks[cid]

                tree = await tree_of(reader.close(), get)
        except WetwareError as exc:
            stream.abort(exc)
            transfer.end(error=exc)
            return
        if transfer.over:
            return
        root = self.cluster.add(tree)
        self._pin(root, pin)
        transfer.end(root, max(pin["ack"], 1))

    def _pin(self, root: str, pin: Any) -> None:
        tree = self.cluster.blobs[root]
        others = [p for p in self.cluster.pins if (p["root"], p["name"]) != (root, pin["name"])]
        fields = {name: pin[name] for name in ("name", "copies", "where", "public")}
        self.cluster.pins = [
            {"root": root, "owner": "local:ada", "kind": kind_of(tree), "size": size_of(tree),
             "charged_bytes": size_of(tree), "created_ms": 1_800_000_000_000, "holders": ["n1"],
             **fields},
            *others,
        ]  # fmt: skip

    async def pin(self, root: str, pin: Any) -> dict[str, Any]:
        transfer = Transfer(self.cluster)
        if root in self.cluster.blobs:
            self._pin(root, pin)
            transfer.end(root)
        else:
            transfer.end(error=NotFound(f"nobody has {root}", code="not_found.blob"))
        return {"transfer": transfer}

    async def unpin(self, root: str, name: str) -> dict[str, Any]:
        gone = [p for p in self.cluster.pins if p["root"] == root and name in ("", p["name"])]
        self.cluster.pins = [p for p in self.cluster.pins if p not in gone]
        return {"pins": len(gone)}

    async def pins(self, root: str, after: int, limit: int) -> dict[str, Any]:
        matched = [p for p in reversed(self.cluster.pins) if root in ("", p["root"])]
        end = after + limit
        return {"pins": matched[after:end], "next": end if end < len(matched) else 0}

    async def rm(self, root: str) -> dict[str, Any]:
        gone = (await self.unpin(root, ""))["pins"]
        by = [p for p in self.cluster.pins if root in map(cid_of, below(self.cluster, p["root"]))]
        return {"pins": gone, "pinned_by": by, "others": 0, "freed_bytes": 0 if by else 7}

    async def usage(self) -> dict[str, Any]:
        charged = sum(pin["charged_bytes"] for pin in self.cluster.pins)
        return {
            "usage": {
                "pins": len(self.cluster.pins), "charged_bytes": charged, "quota_bytes": 0,
                "blocks": 0, "disk_bytes": 0, "disk_bytes_max": 0, "free_bytes": 0,
            }
        }  # fmt: skip

    async def gc(self, dry_run: bool, drop_damaged: bool) -> dict[str, Any]:
        dropped = ["'old' of local:ada"] if drop_damaged else []
        found = {"blocks": 3, "bytes": 5000, "kept_blocks": 1, "kept_bytes": 70}
        return {**found, "dropped": dropped}

    async def drain(self) -> dict[str, Any]:
        transfer = Transfer(self.cluster)
        transfer.end()
        return {"transfer": transfer}

    async def verify(self, sink: rpc.Ref | None) -> dict[str, Any]:
        pump = rpc.Pump(sink, items_max=100, bytes_max=1 << 20)
        for finding in self.cluster.findings:
            pump.offer(json.dumps(finding).encode())
        return {"subscription": pump}

    async def all(self, after: int, limit: int) -> dict[str, Any]:
        return await self.pins("", after, limit) | await self.usage()


def below(cluster: Cluster, root: str) -> list[Tree]:
    found = [cluster.blobs[root]]
    for each in found:
        if isinstance(each, dict):
            found += each.values()
    return found


@contextlib.asynccontextmanager
async def served(cluster: Cluster, path: Path) -> AsyncIterator[BlobStore]:
    """A client of the cluster, over a socket at `path`."""
    try:
        async with (
            rpc.runtime(),
            rpc.serve_unix(path, lambda peer: Store(cluster)),
            await rpc.connect_unix(path) as connection,
        ):
            yield BlobStore(connection.bootstrap(SCHEMA.Store))
    finally:
        for task in cluster.tasks:
            task.cancel()
        await asyncio.gather(*cluster.tasks, return_exceptions=True)
