"""`audit`: the history of the contract, and whether it is all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wetware.cli.app import Styled, note, out, out_json, table
from wetware.errors import EXIT_FAILED
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.events import NOBODY
from wetware_auth_evm.cli import words
from wetware_auth_evm.cli.shared import on_chain, profile_of
from wetware_auth_evm.cli.words import stamp, who

if TYPE_CHECKING:
    from wetware_auth_evm.cli.given import Where
    from wetware_auth_evm.cli.reads import Chain, History, Logged


def audit(where: Where, *, account: str, last: int, json: bool) -> None:
    profile = profile_of(where)
    about = parse_address(account) if account else None

    async def work(chain: Chain) -> tuple[History, list[tuple[Logged, bytes]], dict[int, int]]:
        history = await chain.history(note)
        rows, owner = [], NOBODY
        for logged in history.logs:
            event = logged.event
            actor = words.event_actor(event, owner)
            if about is None or about in (event.account, actor):
                rows.append((logged, actor))
            if event.name == "OwnerChanged":
                owner = event.account
        shown = rows[-last:] if last else rows
        return history, shown, await chain.times([logged for logged, _ in shown])

    history, rows, times = on_chain(profile, work)
    if json:
        _audit_json(history, rows, times)
    else:
        _audit_text(history, rows, times)
    for name, problem in history.problems:
        note(Styled("warning:", "yellow"), f" the logs of {name} are not the history: {problem}")
    if not history.complete:
        raise SystemExit(EXIT_FAILED)


def _audit_text(
    history: History, rows: Sequence[tuple[Logged, bytes]], times: dict[int, int]
) -> None:
    cells = [
        (
            str(logged.event.seq),
            str(logged.block),
            stamp(times[logged.block]) if logged.block in times else "?",
            who(actor) if actor else "the deployer",
            words.event_text(logged.event, 0),
        )
        for logged, actor in rows
    ]
    table(("event", "block", "time", "by", "what"), cells)
    state, contract = history.state, history.contract
    head = f"0x{contract.head.hex()}"
    if history.complete:
        out(
            Styled("complete", "green"),
            f": all {contract.seq} events, whose hash is the contract's head {head} at block "
            f"{history.block.number}",
        )
        return
    out(
        Styled("NOT COMPLETE", "red"),
        f": {state.seq} of {contract.seq} events follow each other, and their hash is not the "
        f"contract's head {head} at block {history.block.number}",
    )


def _audit_json(
    history: History, rows: Sequence[tuple[Logged, bytes]], times: dict[int, int]
) -> None:
    out_json(
        {
            "complete": history.complete,
            "seq": history.contract.seq,
            "head": "0x" + history.contract.head.hex(),
            "block": history.block.number,
            "events_found": history.state.seq,
            "problems": [{"endpoint": name, "problem": why} for name, why in history.problems],
            "events": [
                {
                    **words.event_plain(logged.event),
                    "block": logged.block,
                    "time": times.get(logged.block),
                    "tx": "0x" + logged.tx.hex(),
                    "who": who(actor) if actor else None,
                }
                for logged, actor in rows
            ],
        }
    )
