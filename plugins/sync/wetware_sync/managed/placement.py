"""Where the store is: signed, kept by every member, and spread as members meet.

Before anything was moved there is no placement, and the store is at its first home. That node says
once, with its own key, which key signs placements; those have it who run the store's etcd. One with
a higher version takes the place of the one before, for good: so the old home, or a member that was
off, serves nothing any more from when it has met anybody who knows better.

While etcd has the store, a change counts only once more than half of its members have taken it, and
each takes one of a version: so two who change something at once cannot both succeed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base import cbor
from wetware.base.disk import remedy
from wetware.base.private_files import read_private_file, replace_private_file
from wetware.base.threads import to_its_end
from wetware.errors import Busy, InvalidArgument, WetwareError
from wetware.hookspecs import PeerUp
from wetware.identity import Key, PeerId, verify

if TYPE_CHECKING:
    from pathlib import Path

    from wetware.hookspecs import PeerDown, PluginContext

BYTES_MAX: Final = 16 << 10
SEED_BYTES: Final = 32
MEMBERS_MAX: Final = 8
VERSION_MAX: Final = 1 << 62
SERVES: Final = "serves"
"""A member whose etcd has the store, and that users log in at."""
RUNS: Final = "runs"
"""One whose etcd runs, and that nobody is served by: it joins, or the store is being moved."""
CUT: Final = "cut"
"""One that was not there when the store began to be moved: the others do not let its etcd in."""
ANSWER_S: Final = 15.0
"""For a member to take a placement."""
SPREAD_S: Final = 30.0
"""Between two times that a member tells those that it is connected to, without a reason."""
_SERVICE: Final = "kv"
_FILE, _KEY_FILE = "placement", "placement.key"
_DOMAIN: Final = b"ww-sync-placement:1\n"
_KEY_DOMAIN: Final = b"ww-sync-placement-key:1\n"


class BadPlacement(WetwareError):
    """It is not signed by who may say where the store is."""

    code = "sync.placement"


@dataclass(frozen=True, slots=True)
class Part:
    """What a member has of it.

    Attributes:
        since: The version of the placement that brought it in, and the name of its directory.
        state: SERVES, RUNS or CUT.
    """

    since: int
    state: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the store is.

    Attributes:
        version: A higher one counts.
        home: Who has it, in its embedded engine; None: it is in the etcd of the members.
        members: That have a part in that etcd.
    """

    version: int
    home: PeerId | None
    members: Mapping[PeerId, Part] = field(default_factory=dict)

    def having(self, *states: str) -> tuple[PeerId, ...]:
        """The members in these states, in the order of their IDs."""
        return tuple(sorted(peer for peer, part in self.members.items() if part.state in states))

    def encode(self, cluster: str) -> bytes:
        members = [[peer, part.since, part.state] for peer, part in sorted(self.members.items())]
        return cbor.encode([cluster, self.version, self.home or "", members])


def decode(data: bytes, cluster: str) -> Placement:
    """Raises BadPlacement."""
    try:
        match cbor.decode(data, bytes_max=BYTES_MAX):
            case [str(of), int(version), str(home), list(members)] if (
                of == cluster and 0 < version <= VERSION_MAX and len(members) <= MEMBERS_MAX
            ):
                parts = {PeerId.parse(peer): _part(since, state) for peer, since, state in members}
                return Placement(version, PeerId.parse(home) if home else None, parts)
    except (WetwareError, ValueError, TypeError) as exc:
        raise BadPlacement(f"it is no placement: {exc}") from exc
    raise BadPlacement("it is no placement of this cluster")


def _part(since: Any, state: Any) -> Part:
    if type(since) is not int or state not in (SERVES, RUNS, CUT):
        raise ValueError("a member without a part")
    return Part(since, state)


class Placements:
    """What this node knows of it.

    Args:
        ctx: Of the plugin.

    Attributes:
        current: None: the store was never moved, as far as is known here.
        signed: The same as it is passed on; b"".
        changed: Set when `current` is another one, and then another event.
    """

    def __init__(self, ctx: PluginContext) -> None:
        self._ctx = ctx
        self._path: Path = ctx.data_dir / _FILE
        self.current: Placement | None = None
        self.signed = b""
        self._root: PeerId | None = None
        self._key: Key | None = None
        self._taking = anyio.Lock()
        self.changed = anyio.Event()

    @property
    def home(self) -> PeerId | None:
        """Who has the store in its embedded engine; None: nobody, or it is not known (yet)."""
        if self.current is not None:
            return self.current.home
        home: PeerId | None = self._ctx.config.home or self._ctx.overlay.founder()
        return home

    # --- on disk ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Read what was known. Blocks. Raises BadPlacement: then nothing must be served."""
        with contextlib.suppress(FileNotFoundError):
            signed = read_private_file(self._path, BYTES_MAX)
            self.current, self._root = self._open(signed, None)
            self.signed = signed
        with contextlib.suppress(FileNotFoundError):
            self._key = Key.from_seed(read_private_file(self._ctx.data_dir / _KEY_FILE, SEED_BYTES))

    def _open(self, signed: bytes, root: PeerId | None) -> tuple[Placement, PeerId]:
        """What is signed, and by whose word; with a `root` by that one's alone."""
        try:
            match cbor.decode(signed, bytes_max=BYTES_MAX):
                case [bytes(body), bytes(by_key), bytes(key), bytes(by_root), str(named)]:
                    said = PeerId.parse(named)
                    public = said.public_key
                    if root is not None and said != root:
                        raise BadPlacement(f"{said} does not say where the store is, but {root}")
                    given = _KEY_DOMAIN + self._ctx.overlay.cluster.encode() + key
                    if public is None or not verify(public, by_root, given):
                        raise BadPlacement("its key is not the one that the first home has named")
                    if not verify(key, by_key, _DOMAIN + body):
                        raise BadPlacement("its signature is wrong")
                    return decode(body, self._ctx.overlay.cluster), said
        except (InvalidArgument, ValueError, TypeError) as exc:
            raise BadPlacement(f"it is no placement: {exc}") from exc
        raise BadPlacement("it is no placement")

    async def take(self, signed: bytes) -> bool:
        """Take one that another member has, if it is newer; whether this is what counts now.

        Raises BadPlacement, and what the disk raises. Who is cancelled waits for its end: one that
        is on the disk counts, and another of the same version must not come in its place.
        """
        return await to_its_end(self._take(signed))

    async def _take(self, signed: bytes) -> bool:
        async with self._taking:
            if signed and signed == self.signed:
                return True
            root = self._root or self._ctx.config.home or self._ctx.overlay.founder()
            if root is None:
                raise BadPlacement("the node where the cluster was founded is not known here (yet)")
            placement, root = self._open(signed, PeerId.parse(root))
            if self.current is not None and placement.version <= self.current.version:
                return False
            await self._write(self._path, signed)
            self.current, self._root, self.signed = placement, root, signed
        self._ctx.log.info(
            "sync.placed",
            version=placement.version,
            home=placement.home or "",
            etcd=",".join(placement.having(SERVES)),
        )
        self.wake()
        return True

    def wake(self) -> None:
        """Whoever waits for `changed` looks again."""
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    async def _write(self, path: Path, data: bytes) -> None:
        try:
            await self._ctx.run_sync(replace_private_file, path, data)
        except OSError as exc:
            raise WetwareError(
                f"{path} cannot be written: {exc.strerror}", hint=remedy(exc), code="sync.placement"
            ) from exc

    # --- signing ----------------------------------------------------------------------------------

    @property
    def seed(self) -> bytes:
        """The secret key, for who joins."""
        assert self._key is not None  # noqa: S101  # who asks has it
        return self._key.seed

    async def keep_key(self, seed: bytes, signed: bytes) -> None:
        """Have the key that has signed a placement; raises BadPlacement for another one."""
        if len(seed) != SEED_BYTES:
            raise BadPlacement("it is no key")
        key = Key.from_seed(seed)
        if cbor.decode(signed, bytes_max=BYTES_MAX)[2] != key.public:
            raise BadPlacement("it is not the key of that placement")
        if self._key is None or self._key.seed != seed:
            await self._write(self._ctx.data_dir / _KEY_FILE, seed)
            self._key = key

    async def sign(self, placement: Placement) -> bytes:
        """As it is passed on. The first home makes the key with the first one."""
        cluster = self._ctx.overlay.cluster
        body = placement.encode(cluster)
        if self.signed:
            _, _, public, by_root, root = cbor.decode(self.signed, bytes_max=BYTES_MAX)
            assert self._key is not None  # noqa: S101  # who asks has it
        else:
            if self._key is None:
                seed = Key.generate().seed
                await self._write(self._ctx.data_dir / _KEY_FILE, seed)
                self._key = Key.from_seed(seed)
            public, root = self._key.public, self._ctx.overlay.peer_id
            by_root = self._ctx.overlay.sign(_KEY_DOMAIN, cluster.encode() + public)
        return cbor.encode([body, self._key.sign(_DOMAIN + body), public, by_root, root])

    async def put(self, placement: Placement) -> bytes:
        """Sign one and take it; for who has the store alone. Returns it as it is passed on."""
        signed = await self.sign(placement)
        if not await self.take(signed):
            raise Busy("another change of the store's place is under way", hint="try again")
        return signed

    # --- spreading --------------------------------------------------------------------------------

    async def spread(self) -> None:
        """Tell those that come, and all when something changes, until cancelled."""
        async with anyio.create_task_group() as tasks:

            def came(event: PeerUp | PeerDown) -> None:
                if isinstance(event, PeerUp):
                    tasks.start_soon(self._meet, event.peer)

            end = self._ctx.overlay.watch_peers(came)
            try:
                while True:
                    with anyio.move_on_after(SPREAD_S):
                        await self.changed.wait()
                    if self.signed:
                        for peer in self._ctx.overlay.peers():
                            tasks.start_soon(self._meet, peer)
            finally:
                end()

    async def _meet(self, peer: PeerId) -> None:
        try:
            await self.tell(peer)
        except WetwareError as exc:
            self._ctx.log.debug("sync.not_told", peer=peer, why=exc.message)

    async def ask(self, peer: PeerId, method: str, **params: object) -> Any:
        """Call a Sibling."""
        sibling = await self._ctx.sibling(peer, _SERVICE)
        with contextlib.closing(sibling), rpc.time_limit(ANSWER_S):
            return await sibling.call(method, **params)

    async def tell(self, peer: PeerId, signed: bytes | None = None) -> bool:
        """Say what is known, and take what the other one knows; whether that is the same then."""
        said = self.signed if signed is None else signed
        theirs: bytes = (await self.ask(peer, "place", placement=said))["placement"]
        if theirs and theirs != said:
            await self.take(theirs)
        return theirs == said

    async def agree(self, placement: Placement, electors: Collection[PeerId]) -> set[PeerId]:
        """Have more than half of the electors take a new one; returns who did. This node does, too.

        Raises Busy where they did not, and as `take`; some may have it all the same, and a later
        one has to take its place.
        """
        signed = await self.put(placement)
        me = self._ctx.overlay.peer_id

        async def ask(peer: PeerId) -> bool:
            try:
                return peer == me or await self.tell(peer, signed)
            except WetwareError as exc:
                self._ctx.log.info("sync.not_agreed", peer=peer, why=exc.message)
                return False

        answers = await asyncio.gather(*map(ask, electors))
        took = {peer for peer, took in zip(electors, answers, strict=True) if took}
        if 2 * len(took) <= len(electors):
            raise Busy(
                f"only {len(took)} of {len(electors)} members of the store's etcd agree",
                hint="see `ww sync etcd status`; try again when more than half of them are there",
            )
        return took
