"""What commands share: which contract, the wallet, and sending one call of the contract."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from wetware.cli.app import ask_passphrase, confirm, node_data_dir, note, options, out, out_json
from wetware.cli.given import read_text
from wetware.errors import InvalidArgument
from wetware_auth_evm.cli import abi, profiles, words
from wetware_auth_evm.cli.reads import Chain
from wetware_auth_evm.cli.writes import Outcome, Transaction, send
from wetware_auth_evm.login import wallets

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.cli.given import Where, Write
    from wetware_auth_evm.login.wallets import Wallet, WalletFile

T = TypeVar("T")
FILE_CHARS_MAX: Final = 64 << 10


def profile_of(where: Where, *, need_contract: bool = True, cluster: str = "") -> Profile:
    return profiles.resolve(
        rpc=where.rpc or (),
        contract=where.contract,
        chain_id=where.chain_id,
        scope=where.scope,
        cluster=cluster,
        file=where.profile,
        data_dir=node_data_dir(),
        config=options.config,
        need_contract=need_contract,
    )


def on_chain(
    profile: Profile, work: Callable[[Chain], Awaitable[T]], *, contract: bool = True
) -> T:
    """Run `work` with the chain, after it was seen to be the right one."""

    async def main() -> T:
        async with Chain(profile) as chain:
            await chain.identify(contract=contract)
            return await work(chain)

    return asyncio.run(main())


def identified(profile: Profile, *, contract: bool = True) -> Profile:
    """The profile with its chain's ID, once the endpoints were seen to be the right ones."""

    async def work(chain: Chain) -> Profile:
        return chain.profile

    return on_chain(profile, work, contract=contract)


def scope_of(profile: Profile) -> bytes:
    return words.parse_scope(profile.scope)


def wallet_file() -> WalletFile:
    return wallets.get(wallets.chosen(options.key))


def own_address() -> bytes:
    return wallet_file().address


def open_wallet(file: WalletFile) -> Wallet:
    return file.open(lambda: ask_passphrase(f"Passphrase of {file.name}: "))


def check(write: Write) -> None:
    """Raise InvalidArgument for options of sending that make no sense."""
    if write.wait not in ("final", "mined", "none"):
        raise InvalidArgument(f"--wait {write.wait[:20]}", hint="write final, mined or none")
    if write.timeout is not None and not 0 <= write.timeout <= 86_400:
        raise InvalidArgument(f"--timeout {write.timeout:g}", hint="write seconds, up to a day")


def change(
    profile: Profile, write: Write, function: str, *args: Any, question: str = "", yes: bool = False
) -> None:
    """Send one call of the contract, or print it; a question is asked unless `yes` answers it."""
    check(write)
    call = abi.calldata(function, *args)
    if write.calldata:
        print_calldata(profile, profile.contract, call)
        return
    file = wallet_file()
    if question:
        confirm(question, yes=yes)
    wallet = open_wallet(file)

    async def work(chain: Chain) -> Outcome:
        tx = Transaction(profile.contract, call, chain.profile.chain_id)
        return await send(chain, wallet, tx, write, note)

    report(on_chain(profile, work), write)


def print_calldata(profile: Profile, to: bytes, call: bytes) -> None:
    number = profile.chain_id or identified(profile, contract=False).chain_id
    out_json(Transaction(to, call, number).as_dict())


def report(outcome: Outcome, write: Write) -> None:
    if write.json:
        out_json(outcome.as_dict())
        return
    for event in outcome.events:
        out(words.event_text(event, time.time()))
    if outcome.status == "sent":
        out(f"0x{outcome.tx.hex()}")


def read_file(file: str, what: str) -> str:
    return read_text(file, what, bytes_max=FILE_CHARS_MAX)
