"""Copies through crashes, partitions and members that come back, in simulated clusters."""

from __future__ import annotations

import pytest

from wetware_blob.replicas.duties import LEASE_S, Copy, Replicas

from .simulation import Lost, World

SEEDS = 600
EVENTS = 300


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 6))]
)
def test_never_fewer_copies_than_wanted(block: int) -> None:
    """But for those on a disk that was lost; and in the end as many as wanted, and no more."""
    drops = faults = 0
    for seed in range(block * SEEDS // 6, (block + 1) * SEEDS // 6):
        with World(seed) as world:
            try:
                world.run(EVENTS)
                world.settle()
                _as_wanted(world)
            except AssertionError as exc:
                exc.add_note(f"seed {seed}")
                raise
        drops, faults = drops + world.drops, faults + world.faulted
    assert drops > 50, "copies are dropped at all"
    assert faults > 20


def _as_wanted(world: World) -> None:
    for id_, copy in world.pins.items():
        if world.count(id_):  # not lost by a fault before there were copies
            assert world.count(id_) == copy.copies
    for node in world.nodes.values():
        for id_, copy in node.disk.items():
            knows = copy.pin.startswith(world.nodes[copy.home].id)
            assert id_ in world.pins or not knows, "what was given up is kept"


class _PromisesWhileDropping(Replicas):
    """Of two that are about to drop, each promises the other to keep its own."""

    async def lease(self, id_: bytes) -> float:
        return LEASE_S if id_ in self._changing else await super().lease(id_)


class _NeedsNoPromise(Replicas):
    """That others said once that they have it is enough."""

    async def _leased(self, copy: Copy) -> bool:
        return len(self.holders(copy)) > copy.copies


class _BelievesAnyStore(Replicas):
    """A home that has a new store gives up what was pinned in the old one."""

    async def _heed(self, id_: bytes, store: bytes, copies: int, where: str) -> None:
        known = self.copies[id_].pin[:8] if id_ in self.copies else store
        await super()._heed(id_, known, copies, where)


@pytest.mark.parametrize("kind", [_PromisesWhileDropping, _NeedsNoPromise, _BelievesAnyStore])
def test_without_the_rule_copies_are_lost(kind: type[Replicas]) -> None:
    def all_seeds() -> None:
        for seed in range(SEEDS):
            with World(seed, kind) as world:
                world.run(EVENTS)

    with pytest.raises(Lost):
        all_seeds()
