"""What each change costs: `python -m plugins.auth_evm.tests.contract.gas` prints the table.

On anvil, gas of whole transactions, the 21,000 of every transaction included.
"""

# ruff: noqa: T201  # it is a command

from __future__ import annotations

from eth_utils.crypto import keccak

from .chains import Acl, Chain, anvil_chain
from .people import ADMIN, ALICE, ALL, ANY, BOB, CAROL, KEY, KEY_2, MEMBER, NODE, OWNER, TEAM

DAY_S = 86_400


def measure(chain: Chain) -> list[tuple[str, int]]:
    """(what, gas), in the order of the table."""
    rows: list[tuple[str, int]] = []
    acl = Acl.deploy(chain, OWNER)
    expiry = chain.time + 300 * DAY_S

    def note(what: str, function: str, *args: object, sender: str = OWNER, each: int = 1) -> None:
        acl.send(function, *args, sender=sender)
        rows.append((what, round(acl.last.gas / each)))

    rows.append(("deploy", acl.last.gas))
    note("grant, by the owner", "grant", TEAM, MEMBER, ALICE, 0, expiry, ALL)
    note("grant again (renew)", "grant", TEAM, MEMBER, ALICE, 0, expiry + 1, ALL)
    many = [(TEAM, MEMBER, f"0x{n + 1:040x}", 0, expiry, ALL) for n in range(20)]
    note("grantMany of 20, for each", "grantMany", many, each=20)
    note("setAdmin", "setAdmin", TEAM, ANY, ADMIN, expiry, ALL)
    note("grant, by an admin", "grant", TEAM, MEMBER, BOB, 0, expiry, ALL, sender=ADMIN)
    note("revoke", "revoke", TEAM, MEMBER, ALICE)
    acl.send("grant", TEAM, NODE, CAROL, 0, expiry, ALL, sender=OWNER)
    note("bindKey, one role", "bindKey", TEAM, [NODE], KEY, expiry, sender=CAROL)
    acl.send("bindKey", TEAM, [NODE], KEY_2, expiry, sender=CAROL)
    note("unbindKey, one role", "unbindKey", TEAM, [NODE], CAROL, keccak(b"key"), sender=CAROL)
    note("revokeAll", "revokeAll", BOB)
    note("resetScope", "resetScope", TEAM)
    note("pause", "pause")
    note("unpause", "unpause")
    note("proposeOwner", "proposeOwner", ALICE)
    return rows


def table(rows: list[tuple[str, int]]) -> str:
    """As the reference has it."""
    lines = ["| change | gas |", "|---|---|", *(f"| {what} | {gas:,} |" for what, gas in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    with anvil_chain() as chain:
        print(table(measure(chain)))
