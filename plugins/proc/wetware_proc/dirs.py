"""Directories that guests read: unpacked once, and kept by their archives' hashes."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from wetware.base.bounds import Claim, Places, less
from wetware.base.threads import Threads, to_its_end
from wetware.errors import InvalidArgument, LimitExceeded
from wetware_proc.archive import ARCHIVE_BYTES_MAX, measure, unpack, unpacked_bytes
from wetware_proc.sources import read, size_of, within

if TYPE_CHECKING:
    from wetware import rpc

DIRS_MAX: Final = 16  # of one process
READ_S: Final = 600.0  # for a source to give a whole archive
READS_PER_OWNER_MAX: Final = 2
READS_MAX: Final = 8
GIVERS_MAX: Final = 1000
"""Principals that are remembered to have given an archive; others give it again."""

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Tree:
    """An archive that is unpacked, in a directory that is named after its hash."""

    path: Path
    bytes: int
    givers: set[str] = field(default_factory=set)


class Dirs:
    """The unpacked directories of one node.

    Args:
        directory: Of nobody else's.
        bytes_max: For all of it, archives that are being read included; half of that is what one
            principal's processes may have at a time.

    Attributes:
        held: Principal → bytes that its processes have.
    """

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory, self._bytes_max = directory, bytes_max
        self._trees: OrderedDict[str, Tree] = OrderedDict()
        self._used = 0
        self._places, self._threads = Places(), Threads()
        self.held: Counter[str] = Counter()
        self._holders: Counter[str] = Counter()  # of a tree, by its hash

    async def begin(self, kept: Container[str]) -> None:
        """Remove what an earlier process of the node has left, but what has these hashes."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in list(self._directory.iterdir()):
            if path.name in kept:
                tree = self._trees[path.name] = Tree(path, await self._run(unpacked_bytes, path))
                self._used += tree.bytes
            else:  # it may be incomplete
                await self._remove(path)

    def kept(
        self, owner: str, hashes: Mapping[str, str], place: contextlib.ExitStack
    ) -> dict[str, Path]:
        """As `hold`, of path → hash that `begin` has found; without those that are gone."""
        return {
            path: self._held(owner, tree, place)
            for path, hash_ in hashes.items()
            if (tree := self._trees.get(hash_)) is not None
        }

    async def hold(
        self, owner: str, given: list[dict[str, Any]], place: contextlib.ExitStack
    ) -> dict[str, Path]:
        """Directories of proc.capnp by their paths, which stay until `place` is closed.

        Raises InvalidArgument "invalid.archive", LimitExceeded.
        """
        if len(given) > DIRS_MAX or len({each["path"] for each in given}) < len(given):
            raise InvalidArgument(
                f"a process has at most {DIRS_MAX} directories, at paths of their own"
            )
        found: dict[str, Path] = {}
        for each in given:
            tree = await self._tree(owner, each["tree"], each["hash"])
            if self.held[owner] + tree.bytes > self._bytes_max // 2:
                raise LimitExceeded(
                    f"directories of {owner}'s processes have {self.held[owner]} bytes of "
                    f"{self._bytes_max // 2} at this node, and this has {tree.bytes} more "
                    "(half of dirs_bytes_max)"
                )
            found[each["path"]] = self._held(owner, tree, place)
        return found

    def _held(self, owner: str, tree: Tree, place: contextlib.ExitStack) -> Path:
        self._holders[tree.path.name] += 1
        place.callback(less, self._holders, tree.path.name)
        self.held[owner] += tree.bytes
        place.callback(less, self.held, owner, tree.bytes)
        return tree.path

    async def _tree(self, owner: str, source: rpc.Ref | None, hash_: str) -> Tree:
        # A hash is no permission: it saves those the reading who gave the archive themselves.
        tree = self._trees.get(hash_)
        if tree is None or owner not in tree.givers:
            if source is None:
                raise InvalidArgument("a directory is given without its archive")
            mine = f"{READS_PER_OWNER_MAX} directories of {owner} are read (READS_PER_OWNER_MAX)"
            with self._places.hold(
                Claim(owner, READS_PER_OWNER_MAX, mine),
                Claim("", READS_MAX, f"{READS_MAX} directories are read (READS_MAX)"),
            ):
                tree = await self._read(source)
            if len(tree.givers) < GIVERS_MAX:
                tree.givers.add(owner)
        self._trees.move_to_end(tree.path.name)
        return tree

    async def _read(self, source: rpc.Ref) -> Tree:
        part = self._directory / f"part-{secrets.token_hex(8)}"
        async with within(READ_S, "the directory"), contextlib.AsyncExitStack() as stack:
            size = await size_of(source, "a directory", ARCHIVE_BYTES_MAX)
            await self._reserve(size, stack)
            part.mkdir(mode=0o700)
            stack.push_async_callback(self._remove, part)
            file, digest = stack.enter_context((part / "archive").open("w+b")), hashlib.sha256()

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            await read(source, "a directory", size, lambda data: self._run(write, data))
            hash_ = digest.hexdigest()
            if (tree := self._trees.get(hash_)) is not None:
                return tree
            nbytes = await self._run(measure, file)
            await self._reserve(nbytes, stack)
            content = part / "content"
            content.mkdir()
            await self._run(unpack, file, content)
            if (tree := self._trees.get(hash_)) is not None:  # meanwhile
                return tree
            tree = self._trees[hash_] = Tree(self._directory / hash_, nbytes)
            content.rename(tree.path)
            self._used += nbytes
            return tree

    async def _reserve(self, nbytes: int, stack: contextlib.AsyncExitStack) -> None:
        """Take so many bytes, which the stack gives back.

        What nobody has used for the longest time makes room. Raises LimitExceeded.
        """
        while self._used + nbytes > self._bytes_max:
            unused = next((name for name in self._trees if name not in self._holders), None)
            if unused is None:
                raise LimitExceeded(
                    f"directories of processes have {self._used} bytes of {self._bytes_max}, and "
                    f"this needs {nbytes} more (dirs_bytes_max)",
                    hint="end some processes, or run it at another node",
                    code="limit.proc_dirs",
                )
            tree = self._trees.pop(unused)
            gone = self._directory / f"part-{secrets.token_hex(8)}"
            tree.path.rename(gone)  # its name is free for one that is read again meanwhile
            await self._remove(gone)
            self._used -= tree.bytes
        self._use(nbytes)
        stack.callback(self._use, -nbytes)

    def _use(self, nbytes: int) -> None:
        self._used += nbytes

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        """In a thread, to its end: it uses files that are closed behind it."""
        return await to_its_end(self._threads.run(function, *args))

    async def _remove(self, path: Path) -> None:
        await self._run(shutil.rmtree, path, True)
