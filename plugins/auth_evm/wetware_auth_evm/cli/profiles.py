"""Where a command finds its chain: flags, a file, the node's try-out chain, ww.toml, a profile.

Nothing secret is in a profile but what an endpoint's URL may hold; it is kept 0600 for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from wetware.base import paths
from wetware.errors import ConfigError, InvalidArgument
from wetware.identity import replace_private_file
from wetware_auth_evm.chain.errors import BadSettings
from wetware_auth_evm.chain.finality import is_endpoint
from wetware_auth_evm.chain.profile import Profile, finality_of
from wetware_auth_evm.node.config import ENDPOINTS_MAX, ROOT_NAME, SCOPE_DEFAULT, AuthEvmConfig

FILE_BYTES_MAX: Final = 64 << 10
NODES_MAX: Final = 64
TEXT_CHARS_MAX: Final = 2048
PROFILE_FILE: Final = "profile.json"
DEV_FILE: Final = "dev.json"

_SECTION = "[plugins.auth_evm]"
_OF_DEV = ("chain_id", "contract", "scope", "genesis_hash", "deployed_at")
_CLUSTER = re.compile(r"[0-9a-f]{16,64}\Z")


def profile_path() -> Path:
    return paths.home() / "evm" / PROFILE_FILE


def dev_path(data_dir: Path) -> Path:
    """Where a node says how its try-out chain is reached."""
    return data_dir / "plugins" / "auth_evm" / DEV_FILE


def resolve(
    *,
    rpc: Sequence[str] = (),
    contract: str = "",
    chain_id: int = 0,
    scope: str = "",
    cluster: str = "",
    file: Path | None = None,
    data_dir: Path | None = None,
    config: Path | None = None,
    need_contract: bool = True,
) -> Profile:
    """The profile that a command works with.

    The first of these that is there is taken as a whole: the file, the node's dev.json,
    [plugins.auth_evm] of ww.toml, the user's profile.json. Flags replace single fields of it; with
    another chain or contract, what was known of the old one is dropped. The cluster is that of the
    flags, of the file, or of the node that runs on this machine.

    Args:
        rpc: URLs of endpoints.
        contract: Address.
        chain_id: EIP-155.
        scope: Name.
        cluster: ID.
        file: A profile.
        data_dir: The local node's.
        config: The configuration file, None for the default one.
        need_contract: Whether a contract has to be known.

    Raises ConfigError that names what is missing and the next command.
    """
    whole = bool(rpc and contract and chain_id)  # nothing else is looked at, be it broken or not
    base = Profile(0, b"", "", ()) if whole else _base(file, data_dir, config)
    found = _with_flags(base, rpc, contract, chain_id, scope)
    named = cluster or (found.cluster if file is not None else "")
    named = named or _node_cluster(data_dir) or found.cluster
    if named and not _CLUSTER.match(named):
        raise InvalidArgument(f"{named[:64]!r} is not the ID of a cluster", hint="ww status")
    found = replace(found, cluster=named)
    missing = [
        what
        for what, there in (
            ("an endpoint (--rpc URL)", found.endpoints),
            ("the contract (--contract ADDRESS)", found.contract or not need_contract),
        )
        if not there
    ]
    if missing:
        where = f"{found.source} does not name" if found.source else "nothing names"
        raise BadSettings(
            f"{where} {' or '.join(missing)}",
            hint="give them, or start a try-out node with `ww node --auth evm --dev`, or take the "
            "profile of a cluster with `ww auth evm use-profile FILE`, or make a contract of your "
            "own with `ww auth evm deploy --rpc URL`",
        )
    return found


def _base(file: Path | None, data_dir: Path | None, config: Path | None) -> Profile:
    if file is not None:
        return read(file)
    if data_dir is not None and (found := _dev(dev_path(data_dir))):
        return found
    if found := _from_config(config):
        return found
    path = profile_path()
    return read(path) if path.exists() else Profile(0, b"", "", ())


def _with_flags(
    base: Profile, rpc: Sequence[str], contract: str, chain_id: int, scope: str
) -> Profile:
    from wetware_auth_evm.chain.addresses import parse_address

    address = parse_address(contract) if contract else base.contract
    chain = chain_id or base.chain_id
    found = base
    if chain != base.chain_id and base.chain_id:
        # An address means nothing on another chain.
        found = Profile(chain, b"", base.scope, (), cluster="", source=base.source)
        address = parse_address(contract) if contract else b""
    elif address != base.contract and base.contract:
        found = replace(base, cluster="", code_hash=b"", deployed_at=0, dev=False)
    if rpc:
        found = replace(found, endpoints=_endpoints(rpc, "--rpc"), quorum=0)
    if rpc or contract or chain_id or scope:
        found = replace(found, source=f"{found.source} and flags" if found.source else "flags")
    return replace(
        found, chain_id=chain, contract=address, scope=scope or found.scope or SCOPE_DEFAULT
    )


def read(path: Path) -> Profile:
    """A profile from a file; raises ConfigError."""
    return from_text(_text(path), str(path))


def from_text(text: str, what: str) -> Profile:
    """A profile from JSON; raises ConfigError."""
    try:
        return _parse(json.loads(text), what)
    except (ValueError, TypeError, KeyError, RecursionError, InvalidArgument, ConfigError) as exc:
        why = f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)
        raise BadSettings(
            f"{what} is no profile: {why[:120]}",
            hint="make one with `ww auth evm export-profile`",
        ) from None


def save(profile: Profile, path: Path | None = None) -> Path:
    """Keep a profile as the user's own, or in a file; returns where."""
    path = path or profile_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, (json.dumps(profile.as_dict(), indent=1) + "\n").encode())
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
    return path


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise BadSettings(f"cannot read {path}: {exc.strerror}") from exc
    if len(raw) > FILE_BYTES_MAX:
        raise BadSettings(f"{path} is too long for a profile")
    return raw.decode("utf-8", "replace")


def _parse(value: Any, what: str) -> Profile:
    """Of a profile's fields, and no others; what is not there is not known."""
    if not isinstance(value, dict) or value.get("v") != 1:
        raise ValueError("no object of version 1")
    cluster = _str(value, "cluster", "")
    if cluster and not _CLUSTER.match(cluster):
        raise ValueError("its cluster is no ID")
    nodes = value.get("nodes", [])
    if not isinstance(nodes, list) or len(nodes) > NODES_MAX:
        raise ValueError(f"its nodes are no list of at most {NODES_MAX} addresses")
    finality = _str(value, "finality", "")
    finality_of(finality, 1, ())
    return Profile(
        chain_id=_int(value, "chain_id", 1),
        contract=_address(value["contract"]),
        scope=_scope(_str(value, "scope", SCOPE_DEFAULT)),
        endpoints=_endpoints(value["endpoints"], "its endpoints"),
        cluster=cluster,
        genesis_hash=_hash(value, "genesis_hash"),
        code_hash=_hash(value, "code_hash"),
        nodes=tuple(map(_plain, nodes)),
        deployed_at=_int({"deployed_at": 0, **value}, "deployed_at", 0),
        quorum=_int({"quorum": 0, **value}, "quorum", 0),
        finality=finality,
        source=what,
    )


def _dev(path: Path) -> Profile | None:
    """The try-out chain of the local node, if it has one; raises ConfigError if it is damaged."""
    if not path.exists():
        return None
    try:
        value = json.loads(_text(path))
        known = {name: value[name] for name in _OF_DEV if name in value}
        here = {"v": 1, "endpoints": [value["url"]], "quorum": 1, "finality": "latest"}
        return replace(_parse({**known, **here}, str(path)), dev=True)
    except (ValueError, TypeError, KeyError, RecursionError, InvalidArgument) as exc:
        raise BadSettings(
            f"{path} is damaged: {str(exc)[:100]}",
            hint="start the node again: it writes the file anew",
        ) from None


def _from_config(path: Path | None) -> Profile | None:
    """[plugins.auth_evm], if it names a contract or endpoints; raises ConfigError."""
    from wetware.config import load

    loaded = load(path=path)
    section = loaded.plugin("auth_evm", AuthEvmConfig)
    if not section.contract and not section.endpoints:
        return None
    return Profile(
        chain_id=section.chain_id,
        contract=_address(section.contract),
        scope=section.scope,
        endpoints=section.endpoints,
        genesis_hash=_hash({"h": section.genesis_hash}, "h"),
        deployed_at=section.deployed_at,
        quorum=section.quorum,
        finality=section.finality,
        source=f"{_SECTION} of {loaded.path}",
    )


def roles_here(profile: Profile, config: Path | None) -> frozenset[str] | None:
    """The roles that a node with the configuration of this machine knows.

    None where the profile is not that node's.
    """
    from wetware.config import load
    from wetware_auth_evm.node.roles import RESERVED, STANDARD

    if not profile.dev and not profile.source.startswith(_SECTION):
        return None
    section = load(path=config).plugin("auth_evm", AuthEvmConfig)
    return RESERVED.union(section.roles or (STANDARD if profile.dev else ()))


def _node_cluster(data_dir: Path | None) -> str:
    """The cluster of the node that runs here, or ""."""
    if data_dir is None:
        return ""
    try:
        cluster = json.loads((data_dir / paths.RUNTIME_FILE).read_bytes()[:FILE_BYTES_MAX])
        return str(cluster["cluster"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


# --- fields ---------------------------------------------------------------------------------------


def _endpoints(value: Any, what: str) -> tuple[str, ...]:
    """http(s) URLs; raises InvalidArgument. Never shown whole: they may hold keys."""
    if not isinstance(value, list | tuple) or len(value) > ENDPOINTS_MAX:
        raise InvalidArgument(f"{what}: a list of at most {ENDPOINTS_MAX} URLs")
    if not all(is_endpoint(_plain(url)) for url in value):
        raise InvalidArgument(f"{what}: an endpoint is an http:// or https:// URL")
    return tuple(dict.fromkeys(value))


def _plain(value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
        raise ValueError("a text was expected")
    return value


def _str(value: Mapping[str, Any], name: str, default: str) -> str:
    return _plain(value.get(name, default))


def _int(value: Mapping[str, Any], name: str, least: int) -> int:
    found = value[name]
    if type(found) is not int or not least <= found < 2**53:
        raise ValueError(f"its {name} is no number of at least {least}")
    return found


def _scope(name: str) -> str:
    from wetware_auth_evm.chain.events import role_id

    role_id(name)
    if name == ROOT_NAME:
        raise ValueError(f"its scope is {ROOT_NAME}, which is no cluster's")
    return name


def _address(text: Any) -> bytes:
    from wetware_auth_evm.chain.addresses import parse_address

    plain = _plain(text)
    return parse_address(plain) if plain not in ("", "0x") else b""


def _hash(value: Mapping[str, Any], name: str) -> bytes:
    raw = bytes.fromhex(_str(value, name, "").removeprefix("0x"))
    if len(raw) not in (0, 32):
        raise ValueError(f"its {name} is no hash")
    return raw
