"""Who is asked for what was announced: one peer for each item, and another where it is silent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import Recent
from wetware.overlay.membership.sources import FACT, Source, Sources, Want
from wetware.overlay.membership.wire import Kind

if TYPE_CHECKING:
    from wetware.overlay.membership.basis import Basis

REFUSED_MAX: Final = 4096
"""Records and facts that were refused, remembered so that they are not fetched again and again."""
REFUSED_S: Final = 60.0
ALTERNATES_MAX: Final = 3
"""Others that announced a version too, and are asked if the first does not answer."""


class Fetching:
    """What this node lacks, and whom it asks.

    Attributes:
        pending: What is to come, and who announced it; the first is asked.
        refused: What is not wanted for a while.
    """

    def __init__(self, basis: Basis, sources: Sources) -> None:
        self._config, self._timers, self._gossip = basis.config, basis.timers, basis.gossip
        self._sources = sources
        self.pending: dict[Want, list[bytes]] = {}
        self.refused: Recent[Want, None] = Recent(REFUSED_S, REFUSED_MAX, basis.timers.now)
        self._asking: dict[bytes, Source] = {}  # have something to be asked for
        self._stopped = False

    def stop(self) -> None:
        """Want nothing more."""
        self._stopped = True

    def want(self, source: Source, want: Want) -> None:
        """Plan to ask a peer for what it announced, unless somebody else is being asked."""
        if self._stopped or want in self.refused:
            return
        others = self.pending.get(want)
        if others is not None:
            if source.key not in others and len(others) <= ALTERNATES_MAX:
                others.append(source.key)
            return
        if max(len(source.queue), len(self.pending) >> 2) >= self._config.members_max:
            return
        self.pending[want] = [source.key]
        source.queue[want] = None
        self._asking[source.key] = source

    def ask_all(self) -> None:
        """Ask for what was wanted since."""
        if not self._asking:  # as after nearly every frame
            return
        asking, self._asking = self._asking, {}
        for source in asking.values():
            self._ask(source)

    def _ask(self, source: Source) -> None:
        if source.asked or not source.queue:
            return
        asked: dict[Want, None] = {}
        keys: list[bytes] = []
        digests: list[bytes] = []
        while source.queue and len(asked) < self._config.fetch_records_max:
            want = next(iter(source.queue))
            del source.queue[want]
            asked[want] = None
            (digests if want[1] == FACT else keys).append(want[0])
        source.asked = asked
        fields: dict[str, Any] = {"k": int(Kind.WANT)}
        if keys:
            fields["w"] = b"".join(keys)
        if digests:
            fields["g"] = b"".join(digests)
        self._timers.after(self._config.fetch_s, self._late, source, asked)
        self._gossip.post(source.key, fields)

    def _late(self, source: Source, asked: dict[Want, None]) -> None:
        if source.asked is asked and asked:
            self.failed(source)

    def failed(self, source: Source) -> None:
        """A peer does not give what it announced: ask others that announced it too."""
        source.silences += 1
        asked, source.asked = source.asked or {}, None
        if source.silences > 1:  # the rest of what it announced as well
            asked.update(source.queue)
            source.queue.clear()
            source.silences = 0
        self._ask_others(source, asked)
        self._ask(source)
        self.ask_all()

    def answered(self, source: Source) -> None:
        """A peer has given all that it will: ask others for the rest."""
        if source.asked is not None:
            asked, source.asked = source.asked, None
            source.silences = 0
            self._ask_others(source, [want for want in asked if want in self.pending])
            self._ask(source)

    def _ask_others(self, source: Source, wants: Iterable[Want]) -> None:
        for want in wants:
            others = [key for key in self.pending.pop(want, ()) if key != source.key]
            if others:
                self.want(self._sources.seen(others[0]), want)
                if want in self.pending:
                    self.pending[want].extend(others[1:])

    def settle(self, wants: Iterable[Want]) -> None:
        """These came."""
        for want in wants:
            self.pending.pop(want, None)

    def refuse(self, wants: Iterable[Want]) -> None:
        """These are not asked for, for a while."""
        for want in wants:
            self.refused.put(want, None)
