"""A tree of files: who has the blocks that another one reads, reads the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument
from wetware_blob.format.build import Entry, symlink
from wetware_blob.format.cid import BadBlock, Cid
from wetware_blob.format.read import Step, tree
from wetware_blob.names import DEPTH_MAX, TARGET_BYTES_MAX

from .trees import TINY, Blocks, collected, run, unhurried

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9)
names = names.filter(lambda name: name not in (".", ".."))
trees = st.recursive(
    st.binary(max_size=40) | names, lambda below: st.dictionaries(names, below, max_size=9)
)
roots = st.dictionaries(names, trees, max_size=9)


def add(blocks: Blocks, what: Any, profile: Any) -> Cid:
    if isinstance(what, bytes):
        return blocks.file(what, profile).cid
    if isinstance(what, str):
        root, block = symlink(what.encode(), profile)
        blocks.add([block])
        return root.cid
    entries = [Entry(name, add(blocks, below, profile), 0) for name, below in what.items()]
    return blocks.directory(entries, profile).cid


def joined(steps: list[Step]) -> Any:
    """What the steps say, files as one."""
    levels: list[dict[str, Any]] = [{}]
    for kind, name, data in steps:
        if kind == "end":
            levels.pop()
        elif kind == "directory":
            levels.append(levels[-1].setdefault(name, {}))
        elif kind == "piece":
            levels[-1][name] += data
        else:
            levels[-1][name] = data.decode() if kind == "symlink" else b""
    (top,) = levels
    return top


@unhurried
@given(roots, st.sampled_from(TINY), st.data())
def test_two_readers_of_the_same_blocks(wanted: Any, profile: Any, data: st.DataObject) -> None:
    blocks, sent = Blocks(), list[tuple[Cid, bytes]]()
    root = add(blocks, wanted, profile)
    steps = run(collected(tree(root, blocks.get)))
    assert joined(steps) == wanted
    files = sum(kind in ("file", "symlink") for kind, _, _ in steps)
    skip = data.draw(st.integers(0, files))

    async def send(cid: Cid) -> bytes:
        sent.append((cid, await blocks.get(cid)))
        return sent[-1][1]

    async def get(cid: Cid) -> bytes:
        there, block = sent.pop(0)
        assert there == cid
        return block

    behind = run(collected(tree(root, send, skip=skip)))
    assert run(collected(tree(root, get, skip=skip))) == behind
    assert not sent
    all_, left = (
        [step for step in found if step[0] not in ("directory", "end")] for found in (steps, behind)
    )
    assert left == all_[len(all_) - len(left) :]
    assert sum(kind in ("file", "symlink") for kind, _, _ in left) == files - skip
    with pytest.raises(InvalidArgument, match="fewer than are skipped"):
        run(collected(tree(root, blocks.get, skip=files + 1)))


def refused(what: Any, code: str, match: str) -> None:
    blocks = Blocks()
    root = blocks.directory([Entry("d", add(blocks, what, TINY[0]), 0)], TINY[0]).cid
    with pytest.raises(InvalidArgument, match=match) as bad:
        run(collected(tree(root, blocks.get)))
    assert bad.value.code == code
    assert bad.value.message.isprintable()


@pytest.mark.parametrize("target", ["/", "../..", "a/../b", "../../x"])
def test_links_that_lead_out_are_refused(target: str) -> None:
    refused({"l\n": target}, "invalid.link", "symbolic link")
    blocks = Blocks()
    assert run(collected(tree(add(blocks, {"d": {"l": "../a"}}, TINY[0]), blocks.get)))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/etc/passwd", "a/b", "a\0b", "ß" * 128])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    from wetware_blob.format.dagpb import Link
    from wetware_blob.format.unixfs import Type, UnixFs

    blocks = Blocks()
    link = Link(bytes(blocks.raw(b"x")), name.encode(), 1)
    root = blocks.node([link], UnixFs(Type.DIRECTORY))
    with pytest.raises(InvalidArgument, match="cannot be the name of a file") as bad:
        run(collected(tree(root, blocks.get)))
    assert bad.value.code == "invalid.name"


def test_a_link_that_none_has_and_a_tree_that_is_too_deep() -> None:
    from wetware_blob.format.unixfs import Type, UnixFs

    for target in (b"", b"a\0b", b"x" * (TARGET_BYTES_MAX + 1)):
        blocks = Blocks()
        cid = blocks.node([], UnixFs(Type.SYMLINK, target))
        root = blocks.directory([Entry("l", cid, 0)], TINY[0]).cid
        with pytest.raises(InvalidArgument, match="symbolic link"):
            run(collected(tree(root, blocks.get)))
    deep: Any = b""
    for _ in range(DEPTH_MAX):
        deep = {"a": deep}
    blocks = Blocks()
    assert run(collected(tree(add(blocks, deep, TINY[0]), blocks.get)))
    refused(deep, "invalid.name", f"more than {DEPTH_MAX} directories")


def test_what_is_no_directory_or_no_unixfs() -> None:
    blocks = Blocks()
    for root in (blocks.raw(b"x"), add(blocks, "link", TINY[0])):
        with pytest.raises(InvalidArgument, match="not a directory"):
            run(collected(tree(root, blocks.get)))
    root = blocks.directory([Entry("a", blocks.node([], b"\xff"), 0)], TINY[0]).cid
    with pytest.raises(BadBlock):
        run(collected(tree(root, blocks.get)))
