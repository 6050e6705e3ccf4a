"""What of the replica outlives the node: the final events, and what is held and unsettled.

The events are kept, not the state that they lead to: at a start they are folded again, and the hash
that comes of it is compared with the contract's. So a damaged or edited file cannot let anybody in.

Two files: events are only ever appended, and the small one is replaced. The events come first, so
that after a crash between the two there are events too many, never too few; they are cut off.

What is held, and that the chain regressed, ends things: that is written also on a full disk, with
the space of a reserve (`base.disk`). Where not even that is possible the reserve is marked, and
after a crash nothing is allowed until an operator has looked, as after a regression.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base.disk import Reserve
from wetware.base.log import get_logger
from wetware.identity import replace_private_file
from wetware_auth_evm.chain.errors import BadLog, BadSettings
from wetware_auth_evm.chain.events import Event, decode
from wetware_auth_evm.chain.state import State

if TYPE_CHECKING:
    from wetware_auth_evm.chain.replica import Replica

log = get_logger("plugin.auth_evm")

EVENTS_FILE: Final = "events.log"
STATE_FILE: Final = "replica.json"
FORGET_FILE: Final = "forget"
_VERSION: Final = 1
_LINE_CHARS_MAX: Final = 2 * (4 + 7) * 32 + 1
STATE_BYTES_MAX: Final = 64 << 20
BLOCKS_MAX: Final = 64
"""Final blocks without any event after which the files are brought up to date anyway."""
PENDING_MAX: Final = 10_000
"""Events that a failing disk did not take; beyond it nothing is kept until the next start."""


class History:
    """Files in the plugin's data directory; the directory is made.

    Args:
        directory: Where they are.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._events, self._state = directory / EVENTS_FILE, directory / STATE_FILE
        self._forget = directory / FORGET_FILE
        self.reserve = Reserve(directory)
        self.reserve.fill()
        self._begin()

    def _begin(self) -> None:
        self._size_bytes = 0
        """Of the events file, as far as a state was saved with it, or will be."""
        self._pending: list[Event] = []
        self._given_up = False
        self._saved: tuple[object, ...] = ()
        self._saved_block = -1
        self._failing = False

    # --- reading ----------------------------------------------------------------------------------

    def load(self, replica: Replica) -> bool:
        """Put back what was kept; returns whether there was anything.

        What is damaged is reported, and the replica is read anew from the chain. Raises ConfigError
        where the files are of another contract, or cannot be read at all: they may say that the
        chain regressed.
        """
        if self.forget_asked():
            self.forget()
            return False
        try:
            kept = self._read()
            if kept is None:
                self._suspect(replica)
                return False
            self._check_contract(kept, replica)
            self._restore(replica, kept)
        except (KeyError, ValueError, TypeError, IndexError, RecursionError, BadLog) as exc:
            log.warning("replica.damaged", error=str(exc)[:120], effect="it is read anew")
            replica.forget()
            self._begin()
            self._suspect(replica)
            return False
        except OSError as exc:
            raise BadSettings(
                f"{exc.filename or self._state} cannot be read: {exc.strerror}",
                hint="give the user of the node the right to read it",
            ) from None
        self._suspect(replica)
        return True

    def _suspect(self, replica: Replica) -> None:
        """What a crash may have lost would have kept somebody out: as after a regression."""
        if self.reserve.marked:
            log.error("replica.unsure", why=self.reserve.marked, hint="`ww auth evm forget`")
            replica.regressed = replica.regressed or (
                f"{self.reserve.marked} when the node crashed on a full disk"
            )

    def _read(self) -> dict[str, Any] | None:
        """What the small file says; raises ValueError if it is damaged, OSError."""
        try:
            with self._state.open("rb") as file:
                text = file.read(STATE_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        kept = json.loads(text)
        if not isinstance(kept, dict) or kept.get("v") != _VERSION:
            raise ValueError(f"{STATE_FILE} is of another version")
        if kept.pop("sha256", None) != _digest(kept):
            raise ValueError(f"{STATE_FILE} was changed")
        return kept

    def _check_contract(self, kept: dict[str, Any], replica: Replica) -> None:
        about = (kept["chain_id"], kept["contract"], kept["scope"])
        if about != (replica.chain_id, replica.contract.hex(), replica.scope.hex()):
            raise BadSettings(
                f"{self._state} is of the contract 0x{about[1]} on chain {about[0]}, scope "
                f"0x{about[2]}, and another one is configured",
                hint="give the other cluster a data directory of its own, with --data-dir",
            )

    def _restore(self, replica: Replica, kept: dict[str, Any]) -> None:
        final = State(replica.chain_id, replica.contract)
        try:
            with self._events.open("rb") as file:
                while final.seq < kept["seq"]:
                    line = file.readline(_LINE_CHARS_MAX + 1)
                    if not line.endswith(b"\n"):
                        raise BadLog(f"{EVENTS_FILE} ends at event {final.seq}")
                    final.apply(_event(line))
                size_bytes = file.tell()
        except FileNotFoundError:
            if kept["seq"]:
                raise BadLog(f"{EVENTS_FILE} is missing") from None
            size_bytes = 0
        if (final.seq, final.head.hex()) != (kept["seq"], kept["head"]):
            raise BadLog(f"{EVENTS_FILE} was changed")
        replica.restore(
            final,
            _block(kept["final"]),
            tip_block=_block(kept["tip"]),
            unsettled=[_event(line) for line in kept["unsettled"]],
            held={_account(who): int(block) for who, block in kept["held"]},
            regressed=str(kept["regressed"]),
        )
        self._size_bytes = size_bytes

    # --- writing ----------------------------------------------------------------------------------

    def save(self, replica: Replica, settled: Sequence[Event] = ()) -> bool:
        """Keep what changed, and the events that are final now; returns whether it is on disk.

        A failing disk costs the next start some reading, not the node: it goes on, says so, and
        tries again with the next save.
        """
        if self._given_up:
            return False
        self._pending += settled
        # The heads stand for the events that lead to them.
        now = (
            *(replica.final.head, replica.tip.head, tuple(replica.held.items())),
            replica.regressed,
        )
        blocks = replica.final_block[0] - self._saved_block
        if now == self._saved and not self._pending and blocks < BLOCKS_MAX:
            return True
        try:
            if self.reserve.missing:
                self.reserve.fill()
            self._write(replica)
        except OSError as exc:
            if not self._failing:
                log.error("replica.not_saved", error=exc.strerror)  # noqa: TRY400
            self._failing = True
            if not self._write_ends(replica):
                if len(self._pending) > PENDING_MAX:
                    self._give_up()
                return False
        else:
            self._failing = False
        self._saved, self._saved_block = now, replica.final_block[0]
        self.reserve.unmark()
        return True

    def _write(self, replica: Replica) -> None:
        self._append()
        replace_private_file(self._state, self._document(replica))

    def _write_ends(self, replica: Replica) -> bool:
        """On a full disk: whether somebody is held, or all are, and that is on it."""
        ends = (tuple(replica.held.items()), replica.regressed)
        if not any(ends) or ends == self._saved[2:]:
            return False
        try:
            with self.reserve.open():
                self._write(replica)
        except OSError:
            self.reserve.mark("what is held until finality may not have been on the disk")
            return False
        return True

    def _append(self) -> None:
        """Write the pending events where the last good ones end, whatever is there."""
        if not self._pending:
            return
        lines = b"".join(b"%s\n" % event.raw.hex().encode() for event in self._pending)
        fd = os.open(self._events, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self._size_bytes)
            at = 0
            while at < len(lines):
                at += os.pwrite(fd, lines[at:], self._size_bytes + at)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._size_bytes += len(lines)
        self._pending = []

    def _document(self, replica: Replica) -> bytes:
        kept: dict[str, Any] = {
            "v": _VERSION,
            "chain_id": replica.chain_id,
            "contract": replica.contract.hex(),
            "scope": replica.scope.hex(),
            "seq": replica.final.seq,
            "head": replica.final.head.hex(),
            "final": [replica.final_block[0], replica.final_block[1].hex()],
            "tip": [replica.tip_block[0], replica.tip_block[1].hex()],
            "unsettled": [event.raw.hex() for event in replica.unsettled],
            "held": [[who.hex() if who else "", block] for who, block in replica.held.items()],
            "regressed": replica.regressed,
        }
        return json.dumps({**kept, "sha256": _digest(kept)}).encode()

    def _give_up(self) -> None:
        # What is on disk stays: it is old, and right.
        log.error("replica.not_kept", events=len(self._pending), effect="the next start reads more")
        self._pending, self._given_up = [], True

    def rewrite(self) -> None:
        """The events that were kept are wrong: the next save begins at the first one."""
        self._begin()

    # --- the operator -----------------------------------------------------------------------------

    def ask_to_forget(self) -> None:
        """What `ww auth evm forget` does: from here on the node begins anew, also a running one.

        After a regression this is how the operator says that the chain as it is now is the right
        one. A running node sees it with its next look at the chain, a stopped one when it starts;
        it then reads the whole history again and lets nobody in before.
        """
        replace_private_file(self._forget, b"")

    def forget_asked(self) -> bool:
        return self._forget.exists()

    def forget(self) -> None:
        """Remove all that was kept, and the request to do so last. Idempotent."""
        self._unlink()
        self.reserve.unmark()
        with contextlib.suppress(FileNotFoundError):
            self._forget.unlink()
        self._begin()

    def _unlink(self) -> None:
        for path in (self._state, self._events):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def status(self) -> dict[str, Any] | None:
        """What was kept, for `ww auth evm status` of a node that does not run; None: nothing.

        Keys: chain_id, contract, scope, seq, head (hex), final and tip ([block number, hash]),
        unsettled (events), held (accounts; "" is everybody), regressed (why, or "").
        Raises OSError, and ValueError where the file is damaged.
        """
        kept = self._read()
        if kept is None:
            return None
        shown = ("chain_id", "contract", "scope", "seq", "head", "final", "tip", "regressed")
        return {
            **{name: kept[name] for name in shown},
            "unsettled": len(kept["unsettled"]),
            "held": [who for who, _ in kept["held"]],
        }


def _digest(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _event(line: str | bytes) -> Event:
    raw = bytes.fromhex(line.strip() if isinstance(line, str) else line.strip().decode("ascii"))
    return decode(tuple(raw[at : at + 32] for at in range(0, 128, 32)), raw[128:])


def _block(value: Any) -> tuple[int, bytes]:
    number, hash_ = value
    return int(number), bytes.fromhex(hash_)


def _account(text: str) -> bytes | None:
    return bytes.fromhex(text) if text else None
