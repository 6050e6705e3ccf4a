"""The CIDs of both profiles at their limits are those of Kubo."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from wetware_blob.format.build import PROFILES, Entry, FileTree, directory, leaf
from wetware_blob.format.cid import DAG_PB, Cid
from wetware_blob.format.read import Claim, judge

PATH = Path(__file__).parents[5] / "shared" / "vectors" / "cid-profiles.json"
if not PATH.is_file():
    pytest.skip(f"the vectors are not at {PATH}", allow_module_level=True)
VECTORS: dict[str, Any] = json.loads(PATH.read_text())


def stream(seed: str, sizes: list[int]) -> Iterator[bytes]:
    """Pieces of the ChaCha20 key stream that the vectors are made of."""
    key = hashlib.sha256(seed.encode()).digest()
    cipher = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    for size in sizes:
        yield cipher.update(bytes(size))


@pytest.mark.parametrize("row", VECTORS["files"], ids=lambda row: row["cid"][-8:])
def test_a_file(row: dict[str, Any]) -> None:
    profile = PROFILES[row["profile"]]
    if "content" in row:
        chunks = [row["content"].encode()]
    else:
        whole, rest = divmod(row["size"], profile.chunk_bytes)
        chunks = list(stream(row["seed"], [profile.chunk_bytes] * whole + [rest] * bool(rest)))
    tree, blocks = FileTree(profile), []
    for chunk in chunks:
        block = leaf(profile, chunk)
        blocks += [block, *tree.add(block.cid, len(chunk), len(block.data))]
    root, last = tree.finish()
    blocks += last
    assert str(root.cid) == row["cid"]
    assert root.size == sum(map(len, chunks))
    assert root.tsize == sum(len(block.data) for block in blocks)
    assert blocks[-1].cid == root.cid


@pytest.mark.parametrize("row", VECTORS["directories"], ids=lambda row: row["kind"])
def test_a_directory(row: dict[str, Any]) -> None:
    profile = PROFILES[row["profile"]]
    block = leaf(profile, b"x")
    alphabet = VECTORS["alphabet"]
    sizes = [row["name_len"]] * (row["files"] - 1) + [row["last_name_len"]]
    names = [
        "".join(alphabet[b % len(alphabet)] for b in each) for each in stream(row["seed"], sizes)
    ]
    assert len(set(names)) == row["files"]
    root, blocks = directory([Entry(name, block.cid, 1) for name in names], profile)
    assert str(root.cid) == row["cid"]
    assert blocks[-1].cid == root.cid
    view = judge(Claim(root.cid), blocks[-1].data)
    assert (view.fanout is not None) == (row["kind"] == "hamt")
    assert len(blocks) == 1 if row["kind"] == "directory" else len(blocks) > 256


def test_the_profiles_are_those_of_the_vectors() -> None:
    assert set(PROFILES) == set(VECTORS["profiles"])
    for name, said in VECTORS["profiles"].items():
        profile = PROFILES[name]
        assert profile.cid_version == said["cid_version"]
        assert profile.raw_leaves == said["raw_leaves"]
        assert profile.chunk_bytes == said["chunk_bytes"]
        assert profile.links_max == said["file_links_max"]
        assert profile.fanout == said["hamt_fanout"]
        assert profile.threshold_bytes == said["hamt_threshold_bytes"]
        assert profile.threshold_of_block == said["hamt_size_estimate"].startswith("bytes of")


def test_an_empty_file_has_one_leaf_without_bytes() -> None:
    known = {
        "unixfs-v1-2025": "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
        "unixfs-v0-2015": "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH",  # of Kubo
    }
    for name, profile in PROFILES.items():
        block = leaf(profile, b"")
        tree = FileTree(profile)
        assert tree.add(block.cid, 0, len(block.data)) == []
        root, blocks = tree.finish()
        assert (str(root.cid), root.size, blocks) == (known[name], 0, [])


def test_an_empty_directory() -> None:
    known = {
        "unixfs-v1-2025": "bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354",
        "unixfs-v0-2015": "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn",  # of Kubo
    }
    for name, profile in PROFILES.items():
        root, (block,) = directory([], profile)
        assert str(root.cid) == known[name]
        assert (root.size, root.tsize) == (0, len(block.data))
        assert Cid.of(DAG_PB, block.data, profile.cid_version) == block.cid
