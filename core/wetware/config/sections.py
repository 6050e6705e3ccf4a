"""The core's own sections, and what makes a class a section."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from wetware.base.setting import setting
from wetware.config.convert import hints_of, type_name
from wetware.errors import InvalidArgument, PluginError

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

ENV_PREFIX: Final = "WW_"
ENV_OTHER: Final = {
    "WW_HOME": "Where everything of a user lives: `keys/`, `node/`, `ww.toml`. "
    "Default `~/.wetware`; for a user without a home directory, what `--data-dir` names.",
    "WW_CONFIG": "The configuration file. Default `$WW_HOME/ww.toml`.",
    "WW_NODE": "The node that a command talks to, as `--node` does.",
    "WW_CONTEXT": "The context of a command, as `--context` does.",
    "WW_KEY": "The user's key, as `--key` does.",
    "WW_PASSPHRASE": "The passphrase of an encrypted key file, where there is no terminal.",
}
"""Variables that are read elsewhere and are no settings."""

_LABELS_MAX: Final = 32
_ALSO_MAX: Final = 3
_ANNOUNCED_MAX: Final = 4
_LABEL: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}=[^,=\s!][^,=\n\t!]{0,127}")
"""A label as text. What selectors give a meaning to cannot be part of it."""


def _check_listen(values: tuple[Multiaddr, ...]) -> None:
    for addr in values:
        if addr.peer is not None or addr.relay is not None:
            raise InvalidArgument(f"{addr}: an address to listen on has no /p2p/…")


def _check_announce(values: tuple[Multiaddr, ...]) -> None:
    import ipaddress

    if len(values) > _ANNOUNCED_MAX:
        raise InvalidArgument(f"{len(values)} addresses; at most {_ANNOUNCED_MAX}")
    for addr in values:
        if addr.peer is not None:
            raise InvalidArgument(f"{addr}: an address to announce does not end in /p2p/…")
        if addr.port == 0:
            raise InvalidArgument(f"{addr}: port 0 cannot be dialled")
        if addr.is_loopback:
            raise InvalidArgument(f"{addr} leads others to themselves")
        if not addr.kind.startswith("dns"):
            host = ipaddress.ip_address(addr.host)
            if host.is_unspecified or host.is_link_local or host.is_multicast:
                raise InvalidArgument(f"{addr} is no address that others can dial")


def _check_peers(values: tuple[Multiaddr, ...]) -> None:
    for value in values:
        if value.peer is None:
            raise InvalidArgument(f"{value} must end in /p2p/PEER_ID: a node is known by its key")
        if value.port == 0:
            raise InvalidArgument(f"{value}: port 0 cannot be dialled")


def _check_protocols(values: tuple[str, ...]) -> None:
    for value in values:
        if not re.fullmatch(r"/[!-~]{1,139}", value):
            raise InvalidArgument(f"{value[:80]!r} is not a protocol ID, e.g. /ipfs/bitswap/1.2.0")


def _check_labels(values: tuple[str, ...]) -> None:
    if len(values) > _LABELS_MAX:
        raise InvalidArgument(f"{len(values)} labels; at most {_LABELS_MAX}")
    for value in values:
        if not _LABEL.fullmatch(value):
            raise InvalidArgument(
                f"{value[:80]!r} is not a label: write KEY=VALUE, KEY of a-z, 0-9, '.', '_', '-', "
                "VALUE of printable characters without ',' and '='"
            )


def _check_plugin(value: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", value):
        raise InvalidArgument(f"{value!r} is not a plugin's name: a-z, 0-9 and _, at most 64")


def _check_also(values: tuple[str, ...]) -> None:
    if len(values) > _ALSO_MAX:
        raise InvalidArgument(f"{len(values)} auth backends; at most {_ALSO_MAX}")
    for value in values:
        _check_plugin(value)


def _check_name(value: str) -> None:
    if len(value) > 64 or not value.isprintable() or not value.strip():
        raise InvalidArgument("1 to 64 printable characters, and not blanks alone")


def _default_listen() -> tuple[Multiaddr, ...]:
    from wetware.base.multiaddr import Multiaddr

    return (Multiaddr("ip4", "0.0.0.0", 4001),)  # noqa: S104 - a node is there to be reached; the Gate decides


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """The node itself."""

    data_dir: Path = setting(
        Path("node"),  # of WW_HOME, see Config
        "What the node keeps: its key, the policy, plugins' data. One node at a time uses it.",
        default_text="$WW_HOME/node",
    )
    listen: tuple[Multiaddr, ...] = field(
        default_factory=_default_listen,
        metadata={
            "help": "Addresses to accept connections on. Port 0 lets the system choose. Add "
            '`"/ip6/::/tcp/4001"` on a machine with IPv6; it is no default because listening '
            "fails on one without.",
            "check": _check_listen,
        },
    )
    announce: tuple[Multiaddr, ...] = setting(
        (),
        "Addresses that others are told to dial, before those of this machine: a port that a "
        "router forwards to it, or the public address of a virtual machine. It is for others "
        "alone: `listen` says where this node itself accepts connections.",
        check=_check_announce,
    )
    peers: tuple[Multiaddr, ...] = setting(
        (),
        "Nodes to connect to at the start, beside those that this node remembers: addresses that "
        "end in `/p2p/PEER_ID`. Being named here makes nobody a member.",
        check=_check_peers,
        flag="--peer",
    )
    join: str = setting(
        "",
        "A ticket of `ww invite`, or a certificate of `ww invite --peer`: how a new node becomes a "
        "member. Not needed again once it has joined.",
        default_text="none",
        secret=True,
    )
    labels: tuple[str, ...] = setting(
        (),
        "What others may select this node by: `KEY=VALUE`. Labels of the node's certificate win "
        "over these.",
        check=_check_labels,
        flag="--label",
    )
    open_protocols: tuple[str, ...] = setting(
        (),
        "Protocol IDs of class `open` that peers who are no members may use, too: e.g. Bitswap, "
        "for the IPFS network. Empty: none.",
        check=_check_protocols,
    )
    relay: bool = setting(
        True,
        "Whether this node carries connections of members that cannot dial each other, and those "
        "of strangers to members that asked it to, within bounds. It sees ciphertext alone.",
    )
    port_mapping: bool = setting(
        True,
        "Whether a node without a public address asks its router for a port, by NAT-PMP or UPnP, "
        "which it announces once a member got in there.",
    )
    libp2p: bool = setting(
        True,
        "Whether to run libp2p's control plane: identify, ping and the DHT, for peers that are no "
        "wetware nodes. Costs some 90 MiB.",
    )
    auth: str = setting(
        "local",
        "The auth backend: the plugin of this name, or `auth_NAME`. There is no fallback to "
        "another one.",
        check=_check_plugin,
    )
    auth_also: tuple[str, ...] = setting(
        (),
        "Further auth backends, each for users of its own, e.g. while a cluster moves to another "
        "one. `auth` alone names the cluster and decides about nodes.",
        check=_check_also,
        flag="--auth-also",
    )
    audit: str = setting(
        "audit",
        "The recorder of decisions: the plugin of this name, whose failing refuses them. "
        '"none": they are not recorded, and `ww doctor` warns of it.',
        check=_check_plugin,
    )
    dev: bool = setting(
        False,
        "Try the auth backend out: one that can makes all that it needs on this machine. The node "
        "then listens on loopback only, and nobody joins it.",
    )
    name: str = setting(
        "",
        "What people call this node, in logs and `ww status`.",
        check=_check_name,
        default_text="the host's name",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "The least severe events that are logged."
    )
    log_format: Literal["text", "json"] = setting(
        "text", "One line of text, or one JSON object, per event."
    )


@dataclass(frozen=True, slots=True)
class NoSettings:
    """The section of a plugin that has no settings."""


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    """Which installed plugins are loaded. `[plugins.NAME]` holds the settings of one."""

    enable: tuple[str, ...] | None = setting(
        None,
        "Load these and the auth backend, nothing else; one of them failing stops the node (exit "
        "78). Absent: every installed plugin is loaded, and one that fails is reported.",
        default_text="every installed plugin",
    )
    disable: tuple[str, ...] = setting((), "Never load these. Wins over `enable`.")


SECTIONS: Final[dict[str, type | str]] = {
    "node": NodeConfig,
    "admission": "wetware.overlay.admission.limits:AdmissionLimits",
    "login": "wetware.broker.limits:LoginLimits",
    "broker": "wetware.broker.limits:BrokerLimits",
    "link": "wetware.overlay.link.limits:LinkLimits",
    "plugins": PluginsConfig,
}
"""The classes of the core's sections; those of other parts are imported when they are needed."""


def section_class(name: str) -> type:
    known = SECTIONS[name]
    found: type = pkgutil.resolve_name(known) if isinstance(known, str) else known
    return found


def settings_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a section that `setting` made, by name."""
    return {each.name: each for each in dataclasses.fields(cls) if "help" in each.metadata}


def default_of(each: dataclasses.Field[Any]) -> object:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def range_text(each: dataclasses.Field[Any]) -> str:
    """Which numbers are allowed; limits and durations are never negative."""
    low, high = each.metadata.get("min", 0), each.metadata.get("max")
    return f"{low} or more" if high is None else f"{low} to {high}"


def check_range(each: dataclasses.Field[Any], value: object) -> None:
    """Raise InvalidArgument for a number outside the range of a setting."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = each.metadata.get("min", 0), each.metadata.get("max")
    if value < low or (high is not None and value > high):
        raise InvalidArgument(f"{value} is out of range; {range_text(each)}", code="invalid.range")


def check_schema(cls: object) -> type:
    """Whether a plugin's `ww_register_config` returned a usable section; the class itself.

    Raises PluginError: not a frozen dataclass, a field without a default, an unsupported type.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise _bad_schema(cls, "is not a dataclass")
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # typeshed lacks it
        raise _bad_schema(cls, "is not frozen; write @dataclass(frozen=True, slots=True)")
    fields, settings = dataclasses.fields(cls), settings_of(cls)
    for each in fields:
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise _bad_schema(cls, f"has no default for {each.name!r}")
    try:
        hints = hints_of(cls)
    except Exception as exc:
        raise _bad_schema(cls, f"has an annotation that cannot be resolved: {exc}") from exc
    for name in settings:
        try:
            type_name(hints[name])
        except TypeError as exc:
            raise _bad_schema(cls, f"field {name!r}: {exc}") from None
    if fields and not settings:
        raise _bad_schema(cls, "has no setting: write NAME: TYPE = setting(DEFAULT, TEXT)")
    try:
        cls()
    except Exception as exc:
        raise _bad_schema(cls, f"refuses its own defaults: {exc}") from exc
    return cls


def _bad_schema(cls: object, why: str) -> PluginError:
    name = cls.__qualname__ if isinstance(cls, type) else repr(cls)[:60]
    return PluginError(
        f"its configuration class {name} {why}",
        hint="see ww_register_config in docs/reference/hooks.md",
        code="plugin.config",
    )
