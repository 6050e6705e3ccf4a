"""Random trees have the same CIDs here, with Helia and with Kubo, and go both ways.

WW_SEED repeats a run; it is in the name of what fails.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugins.blob.tests.format.trees import Blocks, collected

from wetware_blob.format.build import PROFILES, V0_2015, Entry, Profile, Root, symlink
from wetware_blob.format.car import Reader, header, section
from wetware_blob.format.cid import Block, Cid
from wetware_blob.format.read import entries, read, stat, walk

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

SEED = int(os.environ.get("WW_SEED", random.SystemRandom().randrange(2**32)))
TREES, TREES_LONG = 20, 40
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-_. äöß\N{SNOWMAN}\N{GRINNING FACE}"

Tree = dict[str, "bytes | str | Tree"]
"""By name: a file, the target of a symlink, or a directory."""


def random_tree(rng: random.Random, profile: Profile, depth: int = 0) -> Tree:
    """A few directories deep; some directories are large enough for a HAMT of a small profile.

    Those with directories in them are not: Helia counts no directory towards the threshold.
    """
    branches = depth < 4 and rng.random() < 0.6
    tree: Tree = {}
    for _ in range(rng.choice((1, 2)) if branches else rng.choice((0, 1, 5, 20, 40))):
        name = "".join(rng.choices(ALPHABET, k=rng.randint(1, 12))).strip(". ") or "x"
        if branches and rng.random() < 0.8:
            tree[name] = random_tree(rng, profile, depth + 1)
        elif rng.random() < 0.15:
            tree[name] = "".join(rng.choices(ALPHABET + "/", k=rng.randint(1, 30)))
        else:
            tree[name] = random_file(rng, profile)
    return tree


def random_file(rng: random.Random, profile: Profile) -> bytes:
    """Often at the limits of the tree; what repeats itself has few blocks."""
    chunk, links = min(profile.chunk_bytes, 512), min(profile.links_max, 8)
    size = rng.choice((0, 1, chunk, chunk * links, chunk * links * 2, rng.randrange(100 * chunk)))
    size = max(size + rng.choice((-1, 0, 1)), 0)
    return rng.randbytes(size) if rng.random() < 0.7 else bytes(size)


def ours(blocks: Blocks, tree: Tree | bytes | str, profile: Profile) -> Root:
    """Build it here."""
    if isinstance(tree, bytes):
        return blocks.file(tree, profile)
    if isinstance(tree, str):
        root, block = symlink(tree.encode(), profile)
        blocks.add([block])
        return root
    made = ((name, ours(blocks, each, profile)) for name, each in tree.items())
    return blocks.directory([Entry(name, root.cid, root.tsize) for name, root in made], profile)


async def as_read(root: Cid, blocks: Blocks) -> Tree | bytes | str:
    """What our reader finds."""
    found = await stat(root, blocks.get)
    if found.kind == "symlink":
        return found.data.decode()
    if found.kind == "file":
        content = b"".join(await collected(read(root, 0, None, blocks.get)))
        assert len(content) == found.size
        return content
    listed = await collected(entries(root, blocks.get))
    return {entry.name: await as_read(entry.cid, blocks) for entry in listed}


async def car_of(root: Cid, blocks: Blocks) -> bytes:
    found = await collected(walk(root, blocks.get))
    return header(root) + b"".join(section(block) for block in found)


def of_car(data: bytes) -> tuple[Cid, Blocks]:
    """All blocks of a file, and its one root."""
    reader, blocks = Reader(), Blocks()
    for at in range(0, len(data), 10_000):
        blocks.add(reader.feed(data[at : at + 10_000]))
    return reader.close(), blocks


# --- Helia ----------------------------------------------------------------------------------------


def flat(tree: Tree, path: str) -> Iterator[dict[str, object]]:
    """As Helia takes it."""
    yield {"path": path}
    for name, each in tree.items():
        inner = f"{path}/{name}"
        if isinstance(each, bytes):
            yield {"path": inner, "content": base64.b64encode(each).decode()}
        elif isinstance(each, str):
            yield {"path": inner, "link": each}
        else:
            yield from flat(each, inner)


def unflat(found: list[dict[str, str]]) -> Tree:
    """What Helia read."""
    tree: Tree = {}
    for entry in found:
        *above, name = entry["path"].split("/")
        place: Any = tree
        for each in above:
            place = place[each]
        content = base64.b64decode(entry.get("content", ""))
        kinds = {"file": content, "symlink": content.decode(errors="replace"), "directory": {}}
        place[name] = kinds[entry["type"]]
    return tree


SMALL = {
    f"{name} of {chunk} bytes": replace(p, chunk_bytes=chunk, links_max=links, threshold_bytes=size)
    for name, p in PROFILES.items()
    for chunk, links, size in ((8, 3, 300), (64, 5, 1500))
}


trees = pytest.mark.parametrize("trees", [TREES, pytest.param(TREES_LONG, marks=pytest.mark.long)])


@trees
@pytest.mark.parametrize("name", [*PROFILES, *SMALL])
async def test_helia_makes_the_same_cids_and_both_read_what_the_other_wrote(
    helia: Any, tmp_path: Path, name: str, trees: int
) -> None:
    profile = {**PROFILES, **SMALL}[name]
    rng = random.Random(f"{SEED} {name}")
    theirs_car, ours_car = tmp_path / "theirs.car", tmp_path / "ours.car"
    hamts = 0
    for number in range(trees):
        where = f"WW_SEED={SEED}, tree {number}"
        tree, blocks = random_tree(rng, profile), Blocks()
        root = ours(blocks, tree, profile)
        theirs = await helia.ask(
            "add",
            entries=[*flat(tree, "root")],
            profile=profile.name,
            chunk_bytes=profile.chunk_bytes,
            links_max=profile.links_max,
            threshold_bytes=profile.threshold_bytes,
            car=str(theirs_car),
        )
        assert theirs["cid"] == str(root.cid), where

        imported, received = of_car(theirs_car.read_bytes())
        assert imported == root.cid, where
        assert received.data == blocks.data, where
        assert await as_read(imported, received) == tree, where

        ours_car.write_bytes(await car_of(root.cid, blocks))
        back = await helia.ask("read", car=str(ours_car))
        assert back["root"] == str(root.cid), where
        assert unflat(back["entries"]) == tree, where
        hamts += any(b"\x08\x05\x12" in block for block in blocks.data.values())
    assert hamts or name in PROFILES, f"WW_SEED={SEED}: no tree with a HAMT"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
async def test_helia_makes_the_same_large_file_and_directory(
    helia: Any, tmp_path: Path, profile: Profile
) -> None:
    rng = random.Random(SEED)
    car = tmp_path / "theirs.car"
    options = {
        "profile": profile.name,
        "chunk_bytes": profile.chunk_bytes,
        "links_max": profile.links_max,
        "threshold_bytes": profile.threshold_bytes,
        "car": str(car),
    }
    tree: Tree = {f"{n} {'x' * rng.randrange(60)}": b"x" for n in range(5000)}
    for each, flattened in (
        (rng.randbytes(2_000_000), lambda content: [
            {"path": "root", "content": base64.b64encode(content).decode()}
        ]),
        (tree, lambda content: [*flat(content, "root")]),
    ):  # fmt: skip
        blocks = Blocks()
        root = ours(blocks, each, profile)
        theirs = await helia.ask("add", entries=flattened(each), **options, timeout_s=120)
        assert theirs["cid"] == str(root.cid), f"WW_SEED={SEED}"
        imported, received = of_car(car.read_bytes())
        assert received.data == blocks.data
        assert await as_read(imported, received) == each
    assert len(blocks.data) > 256  # a HAMT


# --- Kubo -----------------------------------------------------------------------------------------


def on_disk(tree: Tree | bytes | str, path: Path) -> None:
    """As Kubo takes it."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    elif isinstance(tree, str):
        path.symlink_to(tree)
    else:
        path.mkdir()
        for name, each in tree.items():
            on_disk(each, path / name)


def from_disk(path: Path) -> Tree | bytes | str:
    if path.is_symlink():
        return str(path.readlink())
    if path.is_dir():
        return {each.name: from_disk(each) for each in path.iterdir()}
    return path.read_bytes()


def without_symlinks(tree: Tree | bytes | str) -> Tree | bytes:
    """What the library writes: a symlink becomes a file with the target in it."""
    if isinstance(tree, dict):
        return {name: without_symlinks(each) for name, each in tree.items()}
    return tree.encode() if isinstance(tree, str) else tree


class Flatfs:
    """The blocks of Kubo's repository: one file each, named by the multihash in base32."""

    def __init__(self, repo: Path) -> None:
        self._path = repo / "blocks"
        assert (
            self._path / "SHARDING"
        ).read_text().strip() == "/repo/flatfs/shard/v1/next-to-last/2"

    def _file(self, cid: Cid) -> Path:
        name = base64.b32encode(b"\x12\x20" + cid.digest).decode().rstrip("=")
        return self._path / name[-3:-1] / f"{name}.data"

    async def get(self, cid: Cid) -> bytes:
        block = Block(cid, self._file(cid).read_bytes())
        block.check()
        return block.data

    def put(self, blocks: dict[Cid, bytes]) -> None:
        for cid, data in blocks.items():
            self._file(cid).parent.mkdir(exist_ok=True)
            self._file(cid).write_bytes(data)


@pytest.fixture
async def both_ways(start_kubo: Any, tmp_path: Path) -> Callable[..., Any]:
    """`await both_ways(tree, where)` -> our blocks.

    One Kubo makes the same CID and the same blocks. Another reads ours, which were laid into its
    repository: a Kubo remembers what it has, so that nothing can be taken away from the first one.
    """
    repos = tmp_path / "repo", tmp_path / "other repo"
    maker, reader = [await start_kubo(repo) for repo in repos]
    made, laid = [Flatfs(repo) for repo in repos]

    async def check(tree: Tree | bytes, where: str) -> Blocks:
        blocks = Blocks()
        root = ours(blocks, tree, V0_2015)
        on_disk(tree, tmp_path / f"in {where}")
        theirs = await maker.ask("add", path=str(tmp_path / f"in {where}"), timeout_s=120)
        assert theirs["cid"] == str(root.cid), where
        received = {block.cid: block.data for block in await collected(walk(root.cid, made.get))}
        assert received == blocks.data, where

        laid.put(blocks.data)
        out = tmp_path / f"out {where}"
        await reader.ask("get", cid=str(root.cid), path=str(out), timeout_s=120)
        assert from_disk(out) == without_symlinks(tree), where
        return blocks

    return check


@trees
async def test_kubo_makes_the_same_cids_and_reads_what_we_wrote(both_ways: Any, trees: int) -> None:
    rng = random.Random(SEED)
    for number in range(trees):
        tree = random_tree(rng, V0_2015)
        await both_ways(tree, f"WW_SEED={SEED}, tree {number}")


async def test_kubo_makes_the_same_large_files_and_directories(both_ways: Any) -> None:
    rng = random.Random(SEED)
    chunk = V0_2015.chunk_bytes
    for size in (chunk, chunk + 1, chunk * V0_2015.links_max + 1):
        content = rng.randbytes(1 << 20) * (size // (1 << 20) + 1)
        await both_ways(content[:size], f"WW_SEED={SEED}, {size} bytes")
    tree: Tree = {f"{n} {'x' * rng.randrange(60)}": b"x" for n in range(5000)}
    blocks = await both_ways(tree, f"WW_SEED={SEED}, directory")
    assert len(blocks.data) > 256  # a HAMT
