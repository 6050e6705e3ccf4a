"""`status`: chain, contract, endpoints and the node here, and what is wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from wetware.base import paths
from wetware.cli.app import Styled, node_data_dir, note, options, out, out_json, run_client, table
from wetware.errors import EXIT_FAILED, WetwareError
from wetware_auth_evm.cli import words
from wetware_auth_evm.cli.reads import Chain, Probe
from wetware_auth_evm.cli.shared import profile_of
from wetware_auth_evm.cli.words import when, who

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.cli.given import Where

BEHIND_BLOCKS_TOLD: Final = 5
CLOCK_S_TOLD: Final = 120
"""`status` tells of a chain whose newest block is older."""


def status(where: Where, *, json: bool) -> None:
    profile = profile_of(where)

    async def work() -> dict[str, Any]:
        async with Chain(profile) as chain:
            return await _chain_status(chain)

    found = asyncio.run(work())
    found["node"] = _node_status()
    problems = [*found["problems"], *_node_problems(found["node"], profile)]
    found["problems"] = problems
    if json:
        out_json(found)
    else:
        _print_status(found)
    if problems:
        raise SystemExit(EXIT_FAILED)


def _problem(what: str, remedy: str) -> dict[str, str]:
    return {"what": what, "try": remedy}


async def _chain_status(chain: Chain) -> dict[str, Any]:
    profile, problems = chain.profile, []
    probes = await chain.probe()
    if not all(probe.error for probe in probes):  # else what is said below says all of it
        problems += _probe_problems(chain, probes)
    found: dict[str, Any] = {
        "chain_id": profile.chain_id or None,
        "contract": who(profile.contract),
        "scope": profile.scope,
        "source": profile.source,
        "finality": str(profile.when_final),
        "quorum": chain.endpoints.quorum,
        "endpoints": [_probe_plain(probe) for probe in probes],
        "state": None,
    }
    try:
        await chain.identify()
        found["chain_id"] = chain.profile.chain_id
        tip = await chain.tip()
        state = await chain.state(tip)
        final = await chain.final(tip)
    except WetwareError as exc:
        problems.append(_problem(exc.message, exc.hint))
    else:
        now = time.time()
        found |= {
            "block": tip.number,
            "block_time": tip.time,
            "final_block": final.number if final is not None else None,
        }
        if state is not None:
            found["state"] = {
                "owner": who(state.owner),
                "paused": state.paused,
                "seq": state.seq,
                "head": "0x" + state.head.hex(),
                "changed_at_block": state.changed_at,
                "pending_owner": who(state.pending) if any(state.pending) else None,
                "owner_ready_at": state.ready_at or None,
            }
            if state.paused:
                problems.append(
                    _problem("the contract is paused: nobody holds any role", "ww auth evm unpause")
                )
        if str(profile.when_final) != "latest" and now - tip.time > CLOCK_S_TOLD:
            problems.append(
                _problem(
                    f"the newest block is {words.span(now - tip.time)} old",
                    "the endpoints are behind, or the clock here is wrong: ww doctor",
                )
            )
    found["problems"] = problems
    return found


def _probe_plain(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "chain_id": probe.chain_id,
        "block": probe.block.number if probe.block is not None else None,
        "latency_ms": round(probe.latency_s * 1000, 1),
        "error": probe.error,
        "dissent": probe.dissent,
    }


def _probe_problems(chain: Chain, probes: Sequence[Probe]) -> list[dict[str, str]]:
    problems = []
    for probe in probes:
        if probe.error:
            problems.append(
                _problem(
                    f"{probe.name} does not answer: {probe.error}",
                    "start the node again" if chain.profile.dev else "check it, or name another",
                )
            )
        if probe.dissent:
            problems.append(
                _problem(
                    f"{probe.name} has {probe.dissent}",
                    "it is behind, on a fork, or lies: replace it if that stays",
                )
            )
    numbers = [p.block.number for p in probes if p.block is not None]
    late = [
        (probe.name, max(numbers) - probe.block.number)
        for probe in probes
        if probe.block is not None
    ]
    remedy = "it catches up, or is to be replaced"
    problems += [
        _problem(f"{name} is {blocks} blocks behind", remedy)
        for name, blocks in late
        if blocks > BEHIND_BLOCKS_TOLD
    ]
    return problems


def _node_status() -> dict[str, Any] | None:
    """What the node on this machine says of its replica; None if none runs."""
    if not (node_data_dir() / paths.RUNTIME_FILE).exists() or options.node:
        return None

    async def work(session: Any) -> dict[str, Any]:
        found: dict[str, Any] = await session.auth_evm.status()
        return found

    try:
        return run_client(work)
    except (WetwareError, AttributeError) as exc:
        return {"error": str(exc), "hint": getattr(exc, "hint", "")}


def _node_problems(node: dict[str, Any] | None, profile: Profile) -> list[dict[str, str]]:
    if node is None or "error" in node:
        return []
    problems = []
    if node["contract"].lower() != who(profile.contract).lower():
        problems.append(
            _problem(
                f"the node here is of another contract, {node['contract']}",
                "give --contract, or leave --profile out",
            )
        )
    if node["regressed"]:
        problems.append(
            _problem(
                "the node saw a block that was final disappear, and admits nobody until an "
                "operator acts",
                "find out what the chain and the endpoints did; then see `ww doctor`",
            )
        )
    elif node["suspended"]:
        problems.append(
            _problem(f"the node admits nobody: {node['suspended']}", "it resumes by itself")
        )
    problems += [
        _problem(warning, "see docs: endpoints and quorum") for warning in node["warnings"]
    ]
    return problems


def _print_status(found: dict[str, Any]) -> None:
    state = found["state"]
    now = time.time()
    lines = [
        ("chain", str(found["chain_id"] or "unknown")),
        ("contract", f"{found['contract']}, scope {found['scope']}"),
        ("from", found["source"] or "flags"),
    ]
    if "block" in found:
        final = found["final_block"]
        lines += [
            ("block", f"{found['block']}, {when(found['block_time'], now)}"),
            ("final", f"{'none yet' if final is None else final} (finality: {found['finality']})"),
        ]
    if state is not None:
        lines += [
            ("owner", state["owner"]),
            ("paused", "yes" if state["paused"] else "no"),
            ("events", f"{state['seq']}, head {state['head']}"),
        ]
        if state["pending_owner"]:
            ready = when(state["owner_ready_at"], now)
            lines.append(("offered", f"to {state['pending_owner']}, who can accept from {ready}"))
    for name, value in lines:
        out(f"{name:9} {value}")
    out("")
    table(
        ("endpoint", "chain", "block", "answers in", "state"),
        [
            (
                endpoint["name"],
                str(endpoint["chain_id"] or "-"),
                str(endpoint["block"] if endpoint["block"] is not None else "-"),
                "-" if endpoint["error"] else f"{endpoint['latency_ms']:.0f} ms",
                endpoint["error"] or endpoint["dissent"] or "agrees",
            )
            for endpoint in found["endpoints"]
        ],
        styles={"state": {"agrees": "green"}},
    )
    _print_node(found["node"])
    for problem in found["problems"]:
        note(Styled("problem:", "red"), f" {problem['what']}")
        if problem["try"]:
            note(f"try: {problem['try']}")


def _print_node(node: dict[str, Any] | None) -> None:
    out("")
    if node is None:
        out("no node runs here")
    elif "error" in node:
        out(f"a node runs here, and does not say how its replica is: {node['error']}")
        if node["hint"]:
            note(f"try: {node['hint']}")
    else:
        out(
            f"the node here is at event {node['seq']} of block {node['tip_block']} (final: event "
            f"{node['final_seq']} of block {node['final_block']}); {node['grants']} grants, "
            f"{node['admins']} admins, {node['keys']} keys"
        )
