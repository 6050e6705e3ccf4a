"""`dev` and `deploy`: a chain on this machine, and a new contract."""

from __future__ import annotations

import json as jsons
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wetware.cli.app import node_data_dir, note, options, out, out_json
from wetware.errors import ConfigError, InvalidArgument
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.errors import ChainError
from wetware_auth_evm.chain.profile import Profile
from wetware_auth_evm.cli import abi, profiles
from wetware_auth_evm.cli.reads import Chain
from wetware_auth_evm.cli.shared import (
    check,
    identified,
    on_chain,
    open_wallet,
    own_address,
    print_calldata,
    profile_of,
    wallet_file,
)
from wetware_auth_evm.cli.words import who
from wetware_auth_evm.cli.writes import Outcome, Transaction, send
from wetware_auth_evm.login import wallets

if TYPE_CHECKING:
    from wetware_auth_evm.cli.given import Where, Write


def dev(*, json: bool) -> None:
    data_dir = node_data_dir()
    running = _running_dev(data_dir)
    if running is not None:
        if json:
            out_json(running.as_dict())
            return
        out(running.endpoints[0])
        note(f"chain {running.chain_id} runs already; its contract is {who(running.contract)}")
        return
    from wetware.base.log import get_logger
    from wetware_auth_evm.dev import tryout

    if options.key:  # the chain grants with this wallet, which it finds by this name
        os.environ["WW_KEY"] = options.key
    wallet = wallets.load_or_create(wallets.chosen(options.key))
    directory = profiles.dev_path(data_dir).parent
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    chain = tryout.start(directory, owner=wallet.address, log=get_logger("plugin.auth_evm"))
    try:
        if json:
            out_json(
                {
                    "url": chain.url,
                    "chain_id": chain.chain_id,
                    "contract": who(chain.contract),
                    "owner": who(wallet.address),
                    "engine": chain.engine,
                }
            )
        else:
            out(chain.url)
        note(
            f"chain {chain.chain_id} ({chain.engine}) with the contract {who(chain.contract)}, "
            f"owned by {who(wallet.address)}; Ctrl-C ends it"
        )
        note("try, in another terminal: ww auth evm status")
        _wait_for_the_end()
    finally:
        chain.close()


def _wait_for_the_end() -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        note("the chain ends")


def _running_dev(data_dir: Path) -> Profile | None:
    """The try-out chain of this data directory, if it answers."""
    if not profiles.dev_path(data_dir).exists():
        return None
    found = profiles.resolve(data_dir=data_dir, config=options.config)
    try:
        return identified(found) if found.dev else None
    except ChainError:
        return None


def deploy(where: Where, write: Write, *, owner: str, write_config: bool) -> None:
    check(write)
    profile = profile_of(where, need_contract=False)
    if write_config:
        _check_no_section()
    address = parse_address(owner) if owner else own_address()
    if not any(address):
        raise InvalidArgument("the owner's address is zero")
    if write.calldata:
        print_calldata(profile, b"", abi.deployment(address))
        return
    if write.wait == "none":
        raise InvalidArgument("a deployment is waited for", hint="--wait mined, or --wait final")
    wallet = open_wallet(wallet_file())

    async def work(chain: Chain) -> tuple[Outcome, Profile]:
        tx = Transaction(b"", abi.deployment(address), chain.profile.chain_id)
        outcome = await send(chain, wallet, tx, write, note)
        made = Profile(
            chain_id=chain.profile.chain_id,
            contract=outcome.created,
            scope=profile.scope,
            endpoints=profile.endpoints,
            genesis_hash=await chain.genesis(),
            deployed_at=outcome.block or 0,
            quorum=profile.quorum,
            finality=profile.finality,
        )
        async with Chain(made) as there:
            await there.identify()
        return outcome, made

    outcome, made = on_chain(profile, work, contract=False)
    section = config_section(made)
    if write.json:
        out_json({**outcome.as_dict(), "owner": who(address), "config": section})
    else:
        out(section.rstrip())
    note(f"the contract is {who(made.contract)}, owned by {who(address)}")
    if write_config:
        path = _write_section(section)
        note(f"written to {path}; it gives nobody anything yet: add [plugins.auth_evm.roles.NAME]")
    else:
        note("put this into ww.toml (or use --write), and add [plugins.auth_evm.roles.NAME]")


def config_section(profile: Profile) -> str:
    """[plugins.auth_evm] for a contract."""
    from wetware_auth_evm.chain import finality

    lines = [
        "[plugins.auth_evm]",
        f"chain_id = {profile.chain_id}",
        f'contract = "{who(profile.contract)}"',
        f"scope = {jsons.dumps(profile.scope, ensure_ascii=False)}",
        f"endpoints = {jsons.dumps(list(profile.endpoints))}",
        f'genesis_hash = "0x{profile.genesis_hash.hex()}"',
        f"deployed_at = {profile.deployed_at}",
    ]
    count = len(profile.endpoints)
    if count < 3:
        lines.append(
            f"quorum = {profile.quorum or finality.quorum_default(count)}"
            "  # better: 3 endpoints of different operators"
        )
    elif profile.quorum:
        lines.append(f"quorum = {profile.quorum}")
    if finality.for_chain(profile.chain_id) is None:
        own = all(map(finality.is_loopback, profile.endpoints))
        named = profile.finality or ("dev" if own else "")
        named = "dev" if named == "latest" else named
        if named:
            lines.append(f'finality = "{named}"')
        else:
            lines += [
                '# finality = "finalized"  # this chain is not known: set these four for it',
                "# poll_s = 2",
                "# verified_s_max = 60",
                "# tip_age_s_max = 60",
            ]
    return "\n".join(lines) + "\n"


def _check_no_section() -> None:
    import tomllib

    from wetware.config import file_path

    path = file_path(options.config)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from None
    if "auth_evm" in found.get("plugins", {}):
        raise ConfigError(
            f"{path} has [plugins.auth_evm] already; it is never overwritten",
            hint="leave --write out, and put the section there yourself",
        )


def _write_section(section: str) -> Path:
    from wetware.config import file_path
    from wetware.identity import replace_private_file

    path = file_path(options.config)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, (before + gap + section).encode())
    except OSError as exc:
        raise ConfigError(
            f"cannot write {path}: {exc.strerror}; the contract is made all the same",
            hint="put the section that was printed there yourself",
        ) from None
    return path
