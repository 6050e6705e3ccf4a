"""The try-out: a chain on this machine with the contract on it, owned by the user's wallet.

anvil if it is there, else eth-tester in a child of its own. What is kept outlives the node: the
chain that comes back has the same blocks, so that what the node knew of it still holds.

Imports nothing heavy: `decide` runs in every start of a node with this backend.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import ConfigError
from wetware.identity import replace_private_file
from wetware_auth_evm.chain.addresses import keccak
from wetware_auth_evm.chain.errors import BadSettings
from wetware_auth_evm.cli.profiles import DEV_FILE
from wetware_auth_evm.dev import anvil
from wetware_auth_evm.dev.process import Child, NotStarted, RpcFailed, call
from wetware_auth_evm.node.config import SCOPE_DEFAULT

if TYPE_CHECKING:
    from wetware.hookspecs import EventLogger, PluginContext
    from wetware_auth_evm.login.wallets import Wallet

CHAIN_ID: Final = 31337
"""Of every try-out chain: what wallets and tools know as a chain for development."""
DIRECTORY: Final = "dev"
"""In the plugin's data directory: what the chain keeps."""
CHAIN_FILE: Final = "chain.sqlite"
FILE_BYTES_MAX: Final = 64 << 10
LOCK_S_MAX: Final = 5.0
"""For the chain of a node that was killed to end: anvil saves its state before."""
MINED_S_MAX: Final = 30.0
GAS_DEPLOY: Final = 3_500_000
GAS_GRANT: Final = 300_000
GRANT_S: Final = 365 * 86_400
"""How long the owner has its role; the contract allows 400 days."""
RIGHTS_ALL: Final = (1 << 128) - 1
OWNER_ROLE: Final = "admin"
BALANCE_WEI: Final = 10**24
"""Of the owner. Gas costs nothing, but some wallets insist on a balance."""

REQUIRED: Final = ("chain_id", "contract", "endpoints")
CHAIN_SETTINGS: Final = frozenset(
    {*REQUIRED, "genesis_hash", "deployed_at", "quorum", "finality", "tip_age_s_max"}
)
"""Settings that say which chain, or how far it is believed."""

# --- whether it is one ----------------------------------------------------------------------------


def decide(ctx: PluginContext) -> bool:
    """Whether this start is a try-out: what was asked for, or nothing at all was said or begun.

    Raises ConfigError for everything in between: a try-out never takes the place of a configuration
    that is there in part, nor of a cluster that was there before.
    """
    began = has_begun(ctx.data_dir)
    said = ", ".join(sorted(ctx.configured))
    if ctx.dev and ctx.authority:
        if clash := sorted(ctx.configured & CHAIN_SETTINGS):
            raise _refuse(
                f"--dev makes a chain of its own, and [plugins.auth_evm] sets {', '.join(clash)}",
                f"leave out --dev; or, for a try-out, {clash[0]}"
                + (" and the others" if clash[1:] else ""),
            )
        if ctx.join_document is not None:
            raise _refuse(
                "--dev, and this node has joined a cluster", f"leave out --dev; or {_ELSEWHERE}"
            )
        if not began and (why := _earlier(ctx)):
            raise _refuse(f"--dev, and {why}", f"leave out --dev; or {_ELSEWHERE}")
        return True
    if ctx.join_document is not None or ctx.configured or not ctx.authority:
        if began:
            of = "has joined a cluster" if ctx.authority else "is of another authority's cluster"
            given = f"[plugins.auth_evm] sets {said}" if said else f"this node {of}"
            raise _refuse(
                f"the data directory is that of a try-out, and {given}",
                "give the cluster a data directory of its own, with --data-dir; or go on with the "
                "try-out: ww node --auth evm --dev, without settings that say which chain it is",
            )
        missing = [name for name in REQUIRED if not getattr(ctx.config, name)]
        if missing and ctx.join_document is None:
            raise _refuse(
                f"the configuration of the auth backend `evm` is not complete: [plugins.auth_evm] "
                f"sets {said or 'nothing'}, and not {', '.join(missing)}",
                f"set {', '.join(missing)} (`ww auth evm deploy` prints a section for ww.toml); or "
                "try it out, without settings that say which chain it is: ww node --auth evm --dev",
            )
        return False
    if not began and (why := _earlier(ctx)):
        raise _refuse(
            f"the auth backend `evm` is not configured, and {why}: a try-out never takes its place",
            f"set [plugins.auth_evm] {', '.join(REQUIRED)}; or {_ELSEWHERE}",
        )
    return True


_ELSEWHERE: Final = (
    "try it out in a data directory of its own: ww --data-dir DIR node --auth evm --dev"
)


def has_begun(directory: Path) -> bool:
    """Whether a plugin's data directory is that of a try-out."""
    return (directory / DEV_FILE).exists() or (directory / DIRECTORY).exists()


def _earlier(ctx: PluginContext) -> str:
    """What says that the data directory is not fresh; "" if it is."""
    if ctx.founding is not None:
        return "the data directory belongs to a cluster that was founded or joined before"
    with contextlib.suppress(FileNotFoundError, StopIteration):
        first = next(ctx.data_dir.iterdir())
        return f"the data directory holds the state of an earlier cluster ({first.name})"
    return ""


def _refuse(message: str, hint: str) -> ConfigError:
    return BadSettings(message, hint=hint)


# --- the chain ------------------------------------------------------------------------------------


@dataclass(slots=True)
class DevChain:
    """A try-out chain that runs, with the contract on it.

    Its `url` is on loopback, another one at each start if the port is taken; `banner` is what
    `ww node` prints of it.
    """

    url: str
    chain_id: int
    contract: bytes
    scope: str
    owner: bytes
    deployed_at: int
    genesis_hash: bytes
    engine: str
    banner: str
    _parts: contextlib.ExitStack = field(repr=False)

    def close(self) -> None:
        """End the chain, saved. Idempotent."""
        self._parts.close()


def start(
    directory: Path,
    *,
    owner: bytes | None = None,
    log: EventLogger,
    scope: str = SCOPE_DEFAULT,
) -> DevChain:
    """Start the try-out chain of a plugin's data directory; at the first start, deploy and grant.

    Blocks for a second or two. From the main thread: the chain ends with the thread that starts it.

    Args:
        directory: Where DEV_FILE is written, which says where the chain is.
        owner: Of the contract, at the first start; None: the user's wallet, made if need be.
        log: For what happens.
        scope: In which the owner gets its role.

    Raises ConfigError: the chain is used by another process, damaged, or does not start.
    """
    place = directory / DIRECTORY
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as parts:
        lock = parts.enter_context(_locked(place))
        kept = _kept(directory, scope)
        if kept is None:
            address, wallet = _owner(owner)
            engine, port = "anvil" if anvil.find_anvil() else "eth-tester", 0
        else:
            address, wallet = bytes.fromhex(kept["owner"][2:]), None
            engine, port = kept["engine"], kept["port"]
        child = _run(place, engine, address, port, lock, log)
        parts.callback(child.close)
        try:
            keeper = anvil.Keeper(place, child.port) if engine == "anvil" else None
            if keeper is not None:
                parts.enter_context(keeper)
            if kept is None:
                kept = _begin(child.port, engine, address, wallet, scope, log)
                if keeper is not None:
                    keeper.save()
            else:
                _compare(child.port, kept, place)
        except RpcFailed as exc:
            raise ConfigError(
                f"the try-out chain ({engine}) does not do what it should: {exc}",
                hint="set WW_ANVIL=none to use the chain in Python"
                if engine == "anvil"
                else "this is a defect of wetware; please report it",
                code="config.dev",
            ) from None
        kept |= {"url": f"http://127.0.0.1:{child.port}", "port": child.port}
        kept["pid"] = child.process.pid
        replace_private_file(directory / DEV_FILE, json.dumps(kept, indent=1).encode())
        log.info("dev.chain", engine=engine, url=kept["url"], contract=kept["contract"])
        return DevChain(
            url=kept["url"],
            chain_id=CHAIN_ID,
            contract=bytes.fromhex(kept["contract"][2:]),
            scope=scope,
            owner=address,
            deployed_at=kept["deployed_at"],
            genesis_hash=bytes.fromhex(kept["genesis_hash"][2:]),
            engine=engine,
            banner=_banner(kept, address),
            _parts=parts.pop_all(),
        )


def _banner(kept: dict[str, Any], owner: bytes) -> str:
    from wetware_auth_evm.login import wallets

    name = wallets.chosen()
    ww = "ww" if name == "default" else f"ww --key {name}"
    mine = ""
    with contextlib.suppress(Exception):  # of no matter: it is what to type, and no more
        found = wallets.find(name)
        mine = f", {found.path}" if found is not None and found.address == owner else ""
    return "\n".join(
        (
            f"  roles     in the contract {kept['contract']}",
            f"  chain     {kept['url']} ({kept['engine']}, chain ID {CHAIN_ID})",
            f"  owner     {kept['owner']}{mine}",
            "try, in another terminal:",
            f"  {ww} auth evm login",
            f"  {ww} whoami",
            f"  {ww} sub chat        and, in a third:  {ww} pub chat hello",
            f"  {ww} auth evm grant member ADDRESS       and: revoke, list, status",
            "for more than a try-out: ww auth evm deploy, then [plugins.auth_evm] in ww.toml",
        )
    )


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[int]:
    """Hold the chain's files; the child holds them too, and so nobody has them before it ended."""
    path = place / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + LOCK_S_MAX
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"the try-out chain in {place} is used by another process",
                        hint="stop it: a node, or `ww auth evm dev`; or begin another try-out, "
                        "with --data-dir",
                        code="config.dev_in_use",
                    ) from None
                time.sleep(0.05)
        yield fd
    finally:
        os.close(fd)


def _kept(directory: Path, scope: str) -> dict[str, Any] | None:
    """What the last start wrote; None at the first one. Raises ConfigError if it is of no use."""
    path = directory / DEV_FILE
    try:
        kept: dict[str, Any] = json.loads(path.read_bytes()[:FILE_BYTES_MAX])
        _check(kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError(
            f"{path} is damaged ({exc})",
            hint="restore it; or begin another try-out, with --data-dir",
            code="config.dev_damaged",
        ) from None
    if kept["engine"] == "py-evm":
        raise ConfigError(
            f"the try-out in {directory} was begun by an earlier version, whose chain in Python is "
            "not read any more",
            hint=f"begin another one: {_ELSEWHERE.partition(': ')[2]}",
            code="config.dev_old",
        )
    if kept["scope"] != scope:
        raise ConfigError(
            f"the try-out was begun with the scope {kept['scope']!r}, and {scope!r} is configured",
            hint="set [plugins.auth_evm] scope back; or begin another try-out, with --data-dir",
            code="config.dev",
        )
    return kept


def _check(kept: dict[str, Any]) -> None:
    for name, size in (("contract", 20), ("owner", 20), ("genesis_hash", 32)):
        if not kept[name].startswith("0x") or len(bytes.fromhex(kept[name][2:])) != size:
            raise ValueError(f"its {name} is none")
    if kept["engine"] not in ("anvil", "eth-tester", "py-evm"):
        raise ValueError("its engine is unknown")
    if type(kept["deployed_at"]) is not int or type(kept["port"]) is not int:
        raise ValueError("a number of it is none")
    if not isinstance(kept["scope"], str):
        raise ValueError("its scope is no text")  # noqa: TRY004  # all is told as one


def _owner(owner: bytes | None) -> tuple[bytes, Wallet | None]:
    """Who will own the contract, and the key where it is here; raises KeyFileError."""
    from wetware_auth_evm.login import wallets

    name = wallets.chosen()
    found = wallets.load_or_create(name) if owner is None else wallets.find(name)
    if found is not None and owner in (None, found.address):
        return found.address, found.open()
    assert owner is not None  # noqa: S101  # or the wallet is its
    return owner, None


def _run(place: Path, engine: str, owner: bytes, port: int, lock: int, log: EventLogger) -> Child:
    """The child, on the port that it had before if that is free."""
    if engine == "anvil":
        command = anvil.command(place, CHAIN_ID)
        ready, env = re.compile(r"Listening on 127\.0\.0\.1:(\d+)"), {"HOME": str(place)}
    elif missing := [each for each in ("eth_tester", "eth", "aiohttp") if find_spec(each) is None]:
        raise ConfigError(
            f"the chain in Python needs packages that are not installed ({', '.join(missing)})",
            hint="pip install 'wetware[evm]'; or install anvil, and see that it is on PATH",
            code="config.dev",
        )
    else:
        command = [sys.executable, "-P", "-m", "wetware_auth_evm.dev.server"]
        command += ["--file", str(place / CHAIN_FILE), "--owner", owner.hex()]
        command += ["--chain-id", str(CHAIN_ID)]
        ready, env = re.compile(r"ready (\d+)$"), {}
    failed = ""
    for each in dict.fromkeys((port, 0)):
        try:
            return Child(
                [*command, "--port", str(each)],
                ready=ready,
                cwd=place,
                env=env,
                keep=(lock,),
                log=log,
            )
        except NotStarted as exc:
            failed = str(exc)
    raise ConfigError(
        f"the try-out chain ({engine}) does not start: {failed}",
        hint="set WW_ANVIL to another anvil"
        if engine == "anvil"
        else "begin another try-out, with --data-dir",
        code="config.dev",
    )


# --- what is on the chain -------------------------------------------------------------------------


def _begin(
    port: int, engine: str, owner: bytes, wallet: Wallet | None, scope: str, log: EventLogger
) -> dict[str, Any]:
    """Deploy the contract, by a key that is thrown away, and give its owner a role.

    Returns what DEV_FILE keeps. Where that is not written, the next start deploys another one.
    """
    from wetware_auth_evm.chain.addresses import checksum
    from wetware_auth_evm.chain.events import role_id
    from wetware_auth_evm.cli import abi
    from wetware_auth_evm.login.wallets import Wallet

    if engine == "anvil":
        call(port, "anvil_setBalance", "0x" + owner.hex(), hex(BALANCE_WEI))
    thrown_away = Wallet.from_secret(bytes(16) + secrets.token_bytes(16))
    receipt = _send(port, thrown_away, b"", abi.deployment(owner), GAS_DEPLOY)
    contract = bytes.fromhex(receipt["contractAddress"][2:])
    if wallet is None:
        log.warning(
            "dev.owner_has_no_role",
            owner=checksum(owner),
            hint=f"ww --key NAME auth evm grant {OWNER_ROLE} {checksum(owner)}",
        )
    else:
        newest = int(_block(port, "latest")["timestamp"], 16)
        expiry = max(int(time.time()), newest) + GRANT_S
        role, where = role_id(OWNER_ROLE), role_id(scope)
        data = abi.calldata("grant", where, role, owner, 0, expiry, RIGHTS_ALL)
        _send(port, wallet, contract, data, GAS_GRANT)
    return {
        "v": 1,
        "chain_id": CHAIN_ID,
        "contract": checksum(contract),
        "scope": scope,
        "owner": checksum(owner),
        "engine": engine,
        "deployed_at": int(receipt["blockNumber"], 16),
        "genesis_hash": _block(port, 0)["hash"],
    }


def _compare(port: int, kept: dict[str, Any], place: Path) -> None:
    """The chain is the one of before; raises ConfigError."""
    from wetware_auth_evm import contract as artifact

    code = bytes.fromhex(call(port, "eth_getCode", kept["contract"], "latest")[2:])
    same = _block(port, 0)["hash"] == kept["genesis_hash"]
    if not same or keccak(code) != artifact.load().runtime_hash:
        raise ConfigError(
            f"the try-out chain in {place} is not the one of {DEV_FILE}: it was lost, or replaced",
            hint="restore it; or begin another try-out, with --data-dir",
            code="config.dev_damaged",
        )


def _block(port: int, at: int | str) -> dict[str, Any]:
    where = at if isinstance(at, str) else hex(at)
    found: dict[str, Any] = call(port, "eth_getBlockByNumber", where, False)
    return found


def _send(port: int, wallet: Wallet, to: bytes, data: bytes, gas: int) -> dict[str, Any]:
    """Send a transaction that costs nothing, and wait for its receipt; raises RpcFailed."""
    from wetware_auth_evm.cli.writes import Fees, Transaction, sign

    nonce = int(call(port, "eth_getTransactionCount", "0x" + wallet.address.hex(), "latest"), 16)
    raw, _ = sign(wallet, Transaction(to, data, CHAIN_ID), gas, Fees(0, None), nonce)
    tx_hash = call(port, "eth_sendRawTransaction", "0x" + raw.hex())
    deadline = time.monotonic() + MINED_S_MAX
    while (receipt := call(port, "eth_getTransactionReceipt", tx_hash)) is None:
        if time.monotonic() > deadline:
            raise RpcFailed(f"a transaction was not mined within {MINED_S_MAX:g} s")
        time.sleep(0.005)
    if int(receipt["status"], 16) != 1:
        raise RpcFailed("a transaction failed")
    found: dict[str, Any] = receipt
    return found
