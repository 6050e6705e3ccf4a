"""How long a login by wallet takes on the node: `python tests/bench/evm_login.py [--rounds N]`.

The backend of auth_evm on a real anvil, its replica warm: from the proof's bytes to the decision,
without the network. Beside it, in the same run, what it cannot do without: recovering the wallet's
signature and verifying the session key's. A contract wallet is asked on the chain, by ERC-1271.

`bench_evm.py` has these figures as a section of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster_report import Report, machine, quantile

from wetware.hookspecs import Accept
from wetware.identity import Proof, verify

if TYPE_CHECKING:
    from plugins.auth_evm.tests.login.world import World

    from wetware.identity import Challenge
    from wetware_auth_evm.login.session import StoredSession

TARGET_MS = 1.0
SECTION = "login by wallet, on the node"


async def _timed(world: World, session: StoredSession, rounds: int) -> list[float]:
    """Milliseconds of each login; every one has a challenge of its own."""
    took = []
    for _ in range(rounds):
        challenge = world.challenge()
        proof = _proof(session, challenge)
        started = time.perf_counter()
        result = await world.backend.authenticate(challenge, proof)
        took.append((time.perf_counter() - started) * 1000)
        assert isinstance(result, Accept), result
    return took


def _proof(session: StoredSession, challenge: Challenge) -> Proof:
    from wetware_auth_evm.login.proofs import SESSION_SCHEME, session_statement

    shown = session.proof
    answer = session.key.sign(session_statement(challenge, shown.digest))
    payload = dataclasses.replace(shown, answer=answer).encode()
    return Proof(SESSION_SCHEME, payload, challenge.signed_bytes())


def _bare(call: Callable[[], object], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        took.append((time.perf_counter() - started) * 1000)
    return took


async def login_figures(report: Report, rounds: int) -> None:
    """Print the section."""
    from plugins.auth_evm.tests.chain.net import net
    from plugins.auth_evm.tests.login.contracts_of import deploy
    from plugins.auth_evm.tests.login.world import ALICE, World

    from wetware_auth_evm.chain.addresses import checksum
    from wetware_auth_evm.login.statements import recover

    report.say(f"\n{SECTION}: {rounds} logins each, one after another; replica warm, anvil")
    with net() as chain, tempfile.TemporaryDirectory() as directory:
        async with World(chain, Path(directory)) as world:
            await world.grant(ALICE.address)
            for form, name in (("eip712", "typed data"), ("eip4361", "text")):
                session = world.session_of(ALICE, form=form)
                took = await _timed(world, session, rounds)
                for share in (0.5, 0.99):
                    report.figure(
                        SECTION,
                        f"EOA, {name}, p{share * 100:g}",
                        quantile(took, share),
                        "ms",
                        at_most=TARGET_MS if share == 0.5 else None,
                        digits=3,
                    )
            proof, statement = session.proof, b"s" * 300
            digest = proof.digest
            answer = session.key.sign(statement)
            for name, call in (
                ("recovering the wallet's signature", lambda: recover(digest, proof.signature)),
                (
                    "verifying the session key's",
                    lambda: verify(session.key.public, answer, statement),
                ),
            ):
                took = _bare(call, rounds)
                report.figure(SECTION, f"of it: {name}, p50", quantile(took, 0.5), "ms", digits=3)
            account = deploy(chain.chain, "OwnersWallet", ("address",), ALICE.address)
            chain.sync_clock()
            await world.grant(checksum(account))
            session = world.session_of(ALICE, account=account, form="erc1271")
            took = await _timed(world, session, min(rounds, 200))
            for share in (0.5, 0.99):
                report.figure(
                    SECTION,
                    f"contract wallet, two blocks asked, p{share * 100:g}",
                    quantile(took, share),
                    "ms",
                    digits=2,
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(as_json=False)
    report.say(machine())
    asyncio.run(login_figures(report, args.rounds))
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
