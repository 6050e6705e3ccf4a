"""ww.toml, `WW_*` variables and flags → frozen dataclasses.

Precedence: flags > environment > file > defaults. A section is a frozen dataclass. Its fields with
a text (metadata `help`) are settings; the others keep their defaults, or what a test gives. All
about a setting is read from its field: type, default, range and text. `[link]` and `[plugins.NAME]`
are therefore the dataclasses of the parts themselves, and cannot drift from them.

A section is resolved when it is first read, so that `ww --help` pays for none; `Config.problems`
resolves all. See docs/reference/config.md, which `describe` generates.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, cast

from wetware.base import paths
from wetware.errors import ConfigError, InvalidArgument, PluginError

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.broker.limits import BrokerLimits, LoginLimits
    from wetware.overlay.admission.limits import AdmissionLimits
    from wetware.overlay.link import LinkLimits

T = TypeVar("T")

HIDDEN: Final = "(hidden)"
"""Shown in place of a secret; a field is one by `metadata={"secret": True}`."""
LABELS_MAX: Final = 32
LABEL: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}=[^,=\s!][^,=\n\t!]{0,127}")
"""A label as text. What selectors give a meaning to cannot be part of it."""

FILE_BYTES_MAX: Final = 1 << 20
"""A configuration file is text that a person wrote; more is a mistake."""
LIST_ITEMS_MAX: Final = 1024
TEXT_CHARS_MAX: Final = 4096
SECTION_KEYS_MAX: Final = 1024
"""Of one section that is a setting's value."""
SECTION_DEPTH_MAX: Final = 8
"""Of sections in such a section."""

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


# --- the core's own sections ---


def _parse_listen(values: tuple[Multiaddr, ...]) -> None:
    for addr in values:
        if addr.peer is not None:
            raise InvalidArgument(f"{addr}: an address to listen on does not end in /p2p/…")


def _parse_peers(values: tuple[Multiaddr, ...]) -> None:
    for value in values:
        if value.peer is None:
            raise InvalidArgument(f"{value} must end in /p2p/PEER_ID: a node is known by its key")
        if value.port == 0:
            raise InvalidArgument(f"{value}: port 0 cannot be dialled")


def _parse_protocols(values: tuple[str, ...]) -> None:
    for value in values:
        if not re.fullmatch(r"/[!-~]{1,139}", value):
            raise InvalidArgument(f"{value[:80]!r} is not a protocol ID, e.g. /ipfs/bitswap/1.2.0")


def _parse_labels(values: tuple[str, ...]) -> None:
    if len(values) > LABELS_MAX:
        raise InvalidArgument(f"{len(values)} labels; at most {LABELS_MAX}")
    for value in values:
        if not LABEL.fullmatch(value):
            raise InvalidArgument(
                f"{value[:80]!r} is not a label: write KEY=VALUE, KEY of a-z, 0-9, '.', '_', '-', "
                "VALUE of printable characters without ',' and '='"
            )


def _parse_plugin(value: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", value):
        raise InvalidArgument(f"{value!r} is not a plugin's name: a-z, 0-9 and _, at most 64")


def _parse_name(value: str) -> None:
    if len(value) > 64 or not value.isprintable() or not value.strip():
        raise InvalidArgument("1 to 64 printable characters, and not blanks alone")


def _default_listen() -> tuple[Multiaddr, ...]:
    from wetware.base.multiaddr import Multiaddr

    return (Multiaddr("ip4", "0.0.0.0", 4001),)  # noqa: S104 - a node is there to be reached; the Gate decides


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """The node itself."""

    data_dir: Path = field(
        default_factory=lambda: paths.home() / "node",
        metadata={
            "help": "What the node keeps: its key, the policy, plugins' data. One node at a time "
            "uses it.",
            "default": "$WW_HOME/node",
            "flag": "--data-dir",
        },
    )
    listen: tuple[Multiaddr, ...] = field(
        default_factory=_default_listen,
        metadata={
            "help": "Addresses to accept connections on. Port 0 lets the system choose. Add "
            '`"/ip6/::/tcp/4001"` on a machine with IPv6; it is no default because listening '
            "fails on one without.",
            "check": _parse_listen,
        },
    )
    peers: tuple[Multiaddr, ...] = field(
        default=(),
        metadata={
            "help": "Nodes to connect to at the start, beside those that this node remembers: "
            "addresses that end in `/p2p/PEER_ID`. Being named here makes nobody a member.",
            "check": _parse_peers,
            "flag": "--peer",
        },
    )
    join: str = field(
        default="",
        metadata={
            "help": "A ticket of `ww invite`, or a certificate of `ww invite --peer`: how a new "
            "node becomes a member. Not needed again once it has joined.",
            "default": "none",
            "flag": "--join",
            "secret": True,
        },
    )
    labels: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "What others may select this node by: `KEY=VALUE`. Labels of the node's "
            "certificate win over these.",
            "check": _parse_labels,
            "flag": "--label",
        },
    )
    open_protocols: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Protocol IDs of class `open` that peers who are no members may use, too: e.g. "
            "Bitswap, for the IPFS network. Empty: none.",
            "check": _parse_protocols,
        },
    )
    libp2p: bool = field(
        default=True,
        metadata={
            "help": "Whether to run libp2p's control plane: identify, ping and the DHT, for peers "
            "that are no wetware nodes. Costs some 90 MiB.",
        },
    )
    auth: str = field(
        default="local",
        metadata={
            "help": "The auth backend: the plugin of this name, or `auth_NAME`. There is no "
            "fallback to another one.",
            "check": _parse_plugin,
        },
    )
    audit: str = field(
        default="audit",
        metadata={
            "help": "The recorder of decisions: the plugin of this name, whose failing refuses "
            'them. "none": they are not recorded, and `ww doctor` warns of it.',
            "check": _parse_plugin,
        },
    )
    dev: bool = field(
        default=False,
        metadata={
            "help": "Try the auth backend out: one that can makes all that it needs on this "
            "machine. The node then listens on loopback only, and nobody joins it.",
            "flag": "--dev",
        },
    )
    name: str = field(
        default="",
        metadata={
            "help": "What people call this node, in logs and `ww status`.",
            "default": "the host's name",
            "check": _parse_name,
        },
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata={"help": "The least severe events that are logged."}
    )
    log_format: Literal["text", "json"] = field(
        default="text", metadata={"help": "One line of text, or one JSON object, per event."}
    )


@dataclass(frozen=True, slots=True)
class NoSettings:
    """The section of a plugin that has no settings."""


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    """Which installed plugins are loaded. `[plugins.NAME]` holds the settings of one."""

    enable: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "Load these and the auth backend, nothing else; one of them failing stops the "
            "node (exit 78). Absent: every installed plugin is loaded, and one that fails is "
            "reported.",
            "default": "every installed plugin",
        },
    )
    disable: tuple[str, ...] = field(
        default=(), metadata={"help": "Never load these. Wins over `enable`."}
    )


_SECTIONS: Final[dict[str, type | tuple[str, str]]] = {
    "node": NodeConfig,
    "admission": ("wetware.overlay.admission.limits", "AdmissionLimits"),
    "login": ("wetware.broker.limits", "LoginLimits"),
    "broker": ("wetware.broker.limits", "BrokerLimits"),
    "link": ("wetware.overlay.link.limits", "LinkLimits"),
    "plugins": PluginsConfig,
}


def _settings(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields of a section that are settings."""
    return [each for each in dataclasses.fields(cls) if "help" in each.metadata]


def _section_class(name: str) -> type:
    known = _SECTIONS[name]
    if isinstance(known, type):
        return known
    return cast("type", getattr(importlib.import_module(known[0]), known[1]))


# --- where a value came from ---


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: "default", "file", "env" or "flag"; a later one wins.
        where: The file and line, the variable or the flag; "default" for a default.
    """

    kind: Literal["default", "file", "env", "flag"]
    where: str

    def __str__(self) -> str:
        return self.where


_DEFAULT = Origin("default", "default")


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value.

    Attributes:
        key: Dotted, e.g. `node.listen` or `plugins.pubsub.buffer_messages`.
        value: The typed value.
        origin: Where it came from.
        secret: Whether the value is not shown.
    """

    key: str
    value: object
    origin: Origin
    secret: bool = False

    @property
    def text(self) -> str:
        """The value as one would write it in ww.toml; "" for an absent one."""
        return HIDDEN if self.secret and self.value else _toml(self.value)

    @property
    def plain(self) -> object:
        return HIDDEN if self.secret and self.value else _plain(self.value)


@dataclass(frozen=True, slots=True)
class _Raw:
    value: object
    origin: Origin
    base: Path | None = None  # what a relative path is relative to; None: the working directory


class _Wrong(Exception):
    """A value is not of the type; the message says what was expected."""

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


class _WrongWithin(Exception):
    """Something inside a setting that is a section is wrong.

    Attributes:
        keys: Where, below the setting.
        expected: What should be there.
        got: What is there.
    """

    def __init__(self, keys: tuple[str, ...], expected: str, got: object) -> None:
        super().__init__(expected)
        self.keys, self.expected, self.got = keys, expected, got


# --- types ---


class _Absent:
    """Stands for a type whose module nothing has imported yet, so that no value can be of it."""


def _address_types() -> tuple[Any, Any]:
    """Multiaddr and PeerId. Their modules cost 60 ms, which `ww --help` does not pay."""
    module = sys.modules.get("wetware.base.multiaddr")
    return (module.Multiaddr, module.PeerId) if module else (_Absent, _Absent)


def _hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a section.

    The names that sections use are supplied, because linters move imports which only annotations
    need under TYPE_CHECKING.
    """
    supplied: dict[str, Any] = {"Path": Path, "Literal": Literal, "Mapping": Mapping, "Any": Any}
    try:
        return typing.get_type_hints(cls, localns=supplied)
    except NameError:
        from wetware.base.multiaddr import Multiaddr
        from wetware.identity import PeerId

        supplied |= {"PeerId": PeerId, "Multiaddr": Multiaddr}
        return typing.get_type_hints(cls, localns=supplied)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _type_name(hint: Any) -> str:
    """What to write for a type, e.g. "a list of addresses"; raises TypeError if unsupported."""
    multiaddr, peer_id = _address_types()
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Path: "a path",
        multiaddr: "an address (/ip4/HOST/tcp/PORT)",
        peer_id: "a peer ID",
    }
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(f'"{arg}"' for arg in args)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(f'"{_enum_text(member)}"' for member in hint)
    if _is_union(hint):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    if hint == _SECTIONS_TYPE:
        return "a section of sections"
    if (item := _item_type(hint)) is not None:
        inner = _type_name(item)
        return f"a list of {_PLURAL.get(inner, inner.removeprefix('a ').removeprefix('an '))}"
    raise TypeError(f"{hint!r} is not supported in a configuration")


_SECTIONS_TYPE: Final = Mapping[str, Mapping[str, Any]]
"""Of a setting that is a section of named sections, whose settings its owner knows."""


def _named_sections(raw: object, expected: str) -> dict[str, dict[str, Any]]:
    """A copy of a section of sections: plain values of TOML, bounded.

    Raises _Wrong or _WrongWithin.
    """
    if not isinstance(raw, Mapping):
        raise _Wrong(expected)
    for key, value in raw.items():
        if not isinstance(value, Mapping):
            raise _WrongWithin((str(key),), "a section", value)
    return cast("dict[str, dict[str, Any]]", _plain_value(raw, ()))


def _plain_value(raw: object, keys: tuple[str, ...]) -> object:
    match raw:
        case bool() | int():
            return raw
        case float() if math.isfinite(raw):
            return raw
        case str() if len(raw) <= TEXT_CHARS_MAX and "\0" not in raw:
            return raw
        case str():
            raise _WrongWithin(keys, f"at most {TEXT_CHARS_MAX} characters, none of them zero", raw)
        case list() | tuple() if len(raw) <= LIST_ITEMS_MAX:
            return [_plain_value(item, (*keys, str(at))) for at, item in enumerate(raw)]
        case list() | tuple():
            raise _WrongWithin(keys, f"a list of at most {LIST_ITEMS_MAX} items", raw)
        case Mapping() if len(raw) <= SECTION_KEYS_MAX and len(keys) < SECTION_DEPTH_MAX:
            return {str(key): _plain_value(value, (*keys, str(key))) for key, value in raw.items()}
        case Mapping():
            raise _WrongWithin(
                keys,
                f"a section of at most {SECTION_KEYS_MAX} settings, in at most "
                f"{SECTION_DEPTH_MAX} others",
                raw,
            )
    raise _WrongWithin(keys, "text, a number, true or false, a list or a section", raw)


_PLURAL: Final = {
    "a whole number": "whole numbers",
    "a number": "numbers",
    "a path": "paths",
    "a peer ID": "peer IDs",
    "text": "text",
    "an address (/ip4/HOST/tcp/PORT)": "addresses",
    "an address (/ip4/HOST/tcp/PORT) or a peer ID": "addresses (…/p2p/PEER_ID) and peer IDs",
}


def _item_type(hint: Any) -> Any:
    """The item type of a list, tuple[X, ...] or frozenset; None for anything else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, frozenset, Sequence) and len(args) == 1:
        return args[0]
    if origin is tuple and len(args) == 2 and args[1] is ...:
        return args[0]
    return None


def _enum_text(member: enum.Enum) -> str:
    return member.value if isinstance(member.value, str) else member.name.lower()


def _got(value: object) -> str:
    """A value as its writer sees it, short."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            shown = value if len(value) <= 60 else value[:59] + "…"
            return f'"{shown}"' if shown.isprintable() else repr(shown)
        case int() | float():
            return f"the number {value}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a section"
        case _:
            return f"a {type(value).__name__}"


_TRUE, _FALSE = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})


def _convert(hint: Any, raw: object, *, text: bool, base: Path | None) -> Any:
    """`raw` as a value of the type.

    Args:
        hint: The resolved annotation.
        raw: From TOML (typed), or from a variable or flag.
        text: Whether a str may stand for other types, as it does in variables and flags.
        base: What a relative path is relative to; None for the working directory.

    Raises _Wrong, or InvalidArgument from the parser of an address or peer ID.
    """
    wrong = _Wrong(_type_name(hint))
    if _is_union(hint):
        return _convert_union(hint, raw, text=text, base=base)
    if hint == _SECTIONS_TYPE:
        return _named_sections(raw, wrong.expected)
    if (item := _item_type(hint)) is not None:
        if text and isinstance(raw, str):
            raw = [part.strip() for part in raw.split(",")] if raw.strip() else []
        if not isinstance(raw, list | tuple):
            raise wrong
        if len(raw) > LIST_ITEMS_MAX:
            raise InvalidArgument(f"a list of {len(raw)} items; at most {LIST_ITEMS_MAX}")
        items = [_convert(item, part, text=text, base=base) for part in raw]
        return (typing.get_origin(hint) if typing.get_origin(hint) is not Sequence else tuple)(
            items
        )
    if isinstance(raw, str) and len(raw) > TEXT_CHARS_MAX:
        raise InvalidArgument(f"a text of {len(raw)} characters; at most {TEXT_CHARS_MAX}")
    if isinstance(raw, str) and "\0" in raw:
        raise InvalidArgument("a text with a zero byte")
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            if raw == choice and type(raw) is type(choice):
                return choice
            if text and isinstance(raw, str) and raw == str(choice):
                return choice
        raise wrong
    if issubclass(hint, enum.Enum):
        for member in hint:
            if raw is member or raw == _enum_text(member):
                return member
        raise wrong
    if hint in _address_types():
        if isinstance(raw, hint):
            return raw
        if not isinstance(raw, str):
            raise wrong
        return hint.parse(raw)
    if hint is Path:
        if not isinstance(raw, str | Path) or raw == "":
            raise wrong
        try:
            path = Path(raw).expanduser()
        except RuntimeError as exc:  # the user after "~" does not exist
            raise InvalidArgument(f"{raw}: {exc}") from None
        return Path(os.path.abspath(path if base is None else base / path))
    return _convert_scalar(hint, raw, text=text, wrong=wrong)


def _convert_scalar(hint: Any, raw: object, *, text: bool, wrong: _Wrong) -> Any:
    if hint is str:
        # An empty text is not "absent": a template or a shell left it where a value was unset.
        if not isinstance(raw, str) or raw == "":
            raise wrong
        return raw
    if hint is bool:
        if text and isinstance(raw, str) and raw.lower() in _TRUE | _FALSE:
            return raw.lower() in _TRUE
        if not isinstance(raw, bool):
            raise wrong
        return raw
    if text and isinstance(raw, str):
        try:
            raw = int(raw) if hint is int else float(raw)
        except ValueError:
            raise wrong from None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise wrong
    if hint is int and not isinstance(raw, int):
        raise wrong
    try:
        if math.isfinite(raw):
            return hint(raw)
    except OverflowError:  # a whole number that no float holds
        if hint is int:
            return raw
    raise wrong


def _convert_union(hint: Any, raw: object, *, text: bool, base: Path | None) -> Any:
    multiaddr, peer_id = _address_types()
    options = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    optional = len(options) < len(typing.get_args(hint))
    if optional and raw is None:
        return None
    if set(options) == {multiaddr, peer_id} and isinstance(raw, str):
        return (multiaddr if raw.startswith("/") else peer_id).parse(raw)
    for option in options:
        try:
            return _convert(option, raw, text=text, base=base)
        except _Wrong:
            continue
    raise _Wrong(_type_name(hint))


def check_schema(cls: object) -> type:
    """Whether a plugin's `ww_register_config` returned a usable section; the class itself.

    Raises PluginError: not a frozen dataclass, a field without a default, an unsupported type.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise _bad_schema(cls, "is not a dataclass")
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # typeshed lacks it
        raise _bad_schema(cls, "is not frozen; write @dataclass(frozen=True, slots=True)")
    try:
        hints = _hints(cls)
    except Exception as exc:
        raise _bad_schema(cls, f"has an annotation that cannot be resolved: {exc}") from exc
    for each in dataclasses.fields(cls):
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise _bad_schema(cls, f"has no default for {each.name!r}")
    for each in (settings := _settings(cls)):
        try:
            _type_name(hints[each.name])
        except TypeError as exc:
            raise _bad_schema(cls, f"field {each.name!r}: {exc}") from None
    if dataclasses.fields(cls) and not settings:
        raise _bad_schema(cls, 'has no setting: write field(default=…, metadata={"help": "…"})')
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


# --- the file ---


class _File:
    """A parsed ww.toml that remembers its lines, so that an error can name one."""

    def __init__(self, path: Path, text: str) -> None:
        import tomllib  # 5 ms, which a machine without a file does not pay

        self.path = path
        self._text = text
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except ValueError as exc:  # TOMLDecodeError, and what int() says of 5,000 digits
            end = f"at line {len(text.splitlines())}, the end of the file"
            raise ConfigError(
                f"{path} is not valid TOML: {str(exc).replace('at end of document', end)}",
                hint="a text is in quotes, a list in brackets: https://toml.io",
                code="config.toml",
            ) from None
        except RecursionError:
            raise ConfigError(
                f"{path} is nested too deeply to be a configuration", code="config.toml"
            ) from None

    def where(self, *keys: str) -> Origin:
        """The file and, where it can be found, the line of a key."""
        line = self._line(keys)
        return Origin("file", f"{self.path} line {line}" if line else str(self.path))

    def _line(self, keys: tuple[str, ...]) -> int | None:
        # A look for the usual way to write it. tomllib gives no positions.
        table: tuple[str, ...] = ()
        for number, line in enumerate(self._text.splitlines(), 1):
            if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$", line):
                table = tuple(part.strip(" \t\"'") for part in header[1].split("."))
                if table[: len(keys)] == keys:
                    return number
            elif entry := re.match(r"\s*([\w.\"'-]+)\s*=", line):
                key = tuple(part.strip("\"'") for part in entry[1].split("."))
                if (*table, *key)[: len(keys)] == keys:
                    return number
        return None


def _read(path: Path, *, required: bool) -> _File | None:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if not required:
            return None
        raise ConfigError(
            f"no configuration file at {path}",
            hint="create it, or unset WW_CONFIG and --config",
            code="config.unreadable",
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"cannot read {path}: {exc.strerror}",
            hint="check the permissions of the file and its folders",
            code="config.unreadable",
        ) from exc
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB; it is not a configuration",
            code="config.unreadable",
        )
    try:
        return _File(path, data.decode("utf-8-sig"))  # some editors write a byte order mark
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} is not valid TOML: line {line} is not UTF-8", code="config.toml"
        ) from None


# --- the configuration ---


def env_name(key: str) -> str:
    """The variable of a setting: `node.data_dir` → `WW_NODE_DATA_DIR`."""
    return ENV_PREFIX + key.replace(".", "_").replace("-", "_").upper()


class Config:
    """The effective configuration. Make one with `load`; sections resolve when first read.

    Attributes:
        home: `WW_HOME`: everything of a user lives there.
        path: The configuration file, whether it exists or not.
    """

    __slots__ = ("_env", "_file", "_flags", "_origins", "_sections", "home", "path")

    def __init__(
        self,
        home: Path,
        path: Path,
        file: _File | None,
        env: Mapping[str, str],
        flags: Mapping[str, object],
    ) -> None:
        self.home = home
        self.path = path
        self._file = file
        self._env = {key: value for key, value in env.items() if key.startswith(ENV_PREFIX)}
        self._flags = {key: value for key, value in flags.items() if value is not None}
        self._sections: dict[str, Any] = {}
        self._origins: dict[str, Origin] = {}
        for key in self._flags:
            section = key.partition(".")[0]
            if section not in _SECTIONS:
                raise ValueError(f"flag for {key!r}: no such section")  # a defect of the caller

    # Each raises ConfigError if the section is wrong.

    @property
    def node(self) -> NodeConfig:
        """`[node]`."""
        return self._core("node", NodeConfig)

    @property
    def login(self) -> LoginLimits:
        """`[login]`."""
        return self._core("login", cast("type[LoginLimits]", _section_class("login")))

    @property
    def broker(self) -> BrokerLimits:
        """`[broker]`."""
        return self._core("broker", cast("type[BrokerLimits]", _section_class("broker")))

    @property
    def admission(self) -> AdmissionLimits:
        """`[admission]`."""
        return self._core("admission", cast("type[AdmissionLimits]", _section_class("admission")))

    @property
    def plugins(self) -> PluginsConfig:
        """`[plugins]`, without the plugins' own sections."""
        return self._core("plugins", PluginsConfig)

    @property
    def link(self) -> LinkLimits:
        """`[link]`."""
        return self._core("link", cast("type[LinkLimits]", _section_class("link")))

    @property
    def exists(self) -> bool:
        return self._file is not None

    @property
    def keys_dir(self) -> Path:
        return self.home / "keys"

    def plugin(self, name: str, cls: type[T]) -> T:
        """`[plugins.NAME]` as an instance of the plugin's own dataclass; raises ConfigError.

        `cls` has passed `check_schema`.
        """
        return self._core(f"plugins.{name}", cls)

    def origin(self, key: str) -> Origin:
        """Where a setting of a resolved section came from; raises KeyError for an unknown one."""
        return self._origins[key]

    def _core(self, section: str, cls: type[T]) -> T:
        if section not in self._sections:
            problems: list[ConfigError] = []
            value = self._resolve(section, cls, problems)
            if problems:
                raise problems[0]
            self._sections[section] = value
        return cast("T", self._sections[section])

    def problems(self, plugins: Mapping[str, type | None] | None = None) -> list[ConfigError]:
        """Everything that is wrong, in the order in which one would fix it.

        Args:
            plugins: Name → config class of every installed plugin; None where the class is not
                known, e.g. of a disabled one. Without it, plugins' sections are not judged.
        """
        found = self._unknown_sections()
        for name in _SECTIONS:
            section: list[ConfigError] = []
            self._resolve(name, _section_class(name), section)
            found += section
        if plugins is not None:
            for name, cls in plugins.items():
                if cls is not None:
                    self._resolve(f"plugins.{name}", cls, found)
            found += self.unknown_plugins(plugins)
        return found

    def check_names(self) -> None:
        """Refuse sections and variables that belong to nothing; raises ConfigError."""
        if problems := self._unknown_sections():
            raise problems[0]

    def unknown_plugins(self, plugins: Mapping[str, type | None]) -> list[ConfigError]:
        """Sections and variables that belong to no installed plugin."""
        found: list[ConfigError] = []
        settings = [each.name for each in _settings(PluginsConfig)]
        table = self._file.data.get("plugins", {}) if self._file else {}
        if isinstance(table, dict) and self._file is not None:
            found += [
                _unknown(
                    f"[plugins.{key}]",
                    self._file.where("plugins", key),
                    "no installed plugin is called so",
                    _nearest(key, plugins),
                    hint="`ww plugin list` shows the installed ones",
                )
                for key, value in table.items()
                if isinstance(value, dict) and key not in plugins and key not in settings
            ]
        # `WW_PLUGINS_AUTH_X` may belong to a plugin `auth` or to a plugin `auth_x`: variables are
        # judged with all plugins known.
        known = {env_name(f"plugins.{key}") for key in settings}
        closed: list[str] = []
        for name, cls in plugins.items():
            if cls is None:
                closed.append(env_name(f"plugins.{name}") + "_")
            else:
                known |= {env_name(f"plugins.{name}.{each.name}") for each in _settings(cls)}
        found += [
            _unknown(name, None, "no installed plugin has this setting", _nearest(name, known))
            for name in self._env
            if name.startswith("WW_PLUGINS_")
            and name not in known
            and not name.startswith(tuple(closed))
        ]
        return found

    def settings(self, plugins: Mapping[str, type | None] | None = None) -> tuple[Setting, ...]:
        """Every effective value and where it came from; raises the first ConfigError."""
        sections: dict[str, Any] = {name: _section_class(name) for name in _SECTIONS}
        for name, cls in (plugins or {}).items():
            if cls is not None:
                sections[f"plugins.{name}"] = cls
        found: list[Setting] = []
        for section, cls in sections.items():
            value = self._core(section, cls)
            found += [
                Setting(
                    f"{section}.{each.name}",
                    getattr(value, each.name),
                    self._origins[f"{section}.{each.name}"],
                    bool(each.metadata.get("secret")),
                )
                for each in _settings(cls)
            ]
        return tuple(found)

    # --- resolving -------------------------------------------------------------------------------

    def _unknown_sections(self) -> list[ConfigError]:
        found: list[ConfigError] = []
        if self._file is not None:
            for key, value in self._file.data.items():
                where = self._file.where(key)
                if key not in _SECTIONS:
                    kind = f"[{key}]" if isinstance(value, dict) else key
                    found.append(_unknown(kind, where, "no such section", _nearest(key, _SECTIONS)))
                elif not isinstance(value, dict):
                    found.append(_mistyped(key, where, "a section", value, hint=f"write [{key}]"))
        for name in self._env:
            if name in ENV_OTHER or name.startswith(
                tuple(env_name(section) + "_" for section in _SECTIONS)
            ):
                continue
            # Other programs may use the prefix, so only a variable that looks misspelt is an error.
            known = [*ENV_OTHER, *(env_name(f"{s}.{k}") for s, k in _cheap_keys())]
            if near := difflib.get_close_matches(name, known, 1, 0.8):
                found.append(_unknown(name, None, "no such setting", near[0]))
        return found

    def _table(self, section: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        keys = tuple(section.split("."))
        table: Any = self._file.data if self._file else {}
        for key in keys:
            table = table.get(key, {})
            if not isinstance(table, dict):
                return {}, keys  # reported as a section that is no section
        return table, keys

    def _raws(self, section: str, cls: type, problems: list[ConfigError]) -> dict[str, _Raw]:
        """Name → the value that wins, unconverted. Unknown names are problems."""
        names = [each.name for each in _settings(cls)]
        found: dict[str, _Raw] = {}
        table, keys = self._table(section)
        for key, value in table.items():
            if section == "plugins" and key not in names:
                if not isinstance(value, dict):
                    where = cast("_File", self._file).where(*keys, key)
                    hint = "the settings of a plugin are a section of their own: [plugins.NAME]"
                    near = _nearest(key, names)
                    problems.append(
                        _unknown(f"plugins.{key}", where, "no such setting", near, hint=hint)
                    )
                continue
            where = cast("_File", self._file).where(*keys, key)
            if key not in names:
                problems.append(
                    _unknown(f"{section}.{key}", where, "no such setting", _nearest(key, names))
                )
            else:
                found[key] = _Raw(value, where, self.path.parent)
        by_env = {env_name(f"{section}.{name}"): name for name in names}
        prefix = env_name(section) + "_"
        for variable, text in self._env.items():
            if variable in by_env:
                found[by_env[variable]] = _Raw(text, Origin("env", variable))
            elif variable.startswith(prefix) and not section.startswith("plugins"):
                near = _nearest(variable, by_env)
                problems.append(_unknown(variable, None, "no such setting", near))
        for key, value in self._flags.items():
            head, _, name = key.rpartition(".")
            if head == section:
                meta = {each.name: each.metadata for each in _settings(cls)}[name]
                flag = meta.get("flag", "--" + name.replace("_", "-"))
                found[name] = _Raw(value, Origin("flag", flag))
        return found

    def _wrong_within(
        self, section: str, name: str, where: Origin, exc: _WrongWithin
    ) -> ConfigError:
        """What is wrong inside a setting, at its own line where that can be found."""
        if where.kind == "file" and self._file is not None:
            # An item of a list, or of an inline section, is at the line of what it is in.
            for end in range(len(exc.keys), 0, -1):
                found = self._file.where(*section.split("."), name, *exc.keys[:end])
                if found.where != str(self._file.path):
                    where = found
                    break
        key = ".".join((section, name, *exc.keys))
        return _mistyped(key, where, exc.expected, exc.got)

    def _resolve(self, section: str, cls: type[T], problems: list[ConfigError]) -> T | None:
        before = len(problems)
        raws = self._raws(section, cls, problems)
        hints = _hints(cls)
        values: dict[str, Any] = {}
        for each in _settings(cls):
            raw = raws.get(each.name)
            self._origins[f"{section}.{each.name}"] = raw.origin if raw else _DEFAULT
            if raw is not None:
                try:
                    values[each.name] = _value(section, each, hints[each.name], raw)
                except _WrongWithin as exc:
                    problems.append(self._wrong_within(section, each.name, raw.origin, exc))
                except ConfigError as exc:
                    problems.append(exc)
        if section == "node" and "data_dir" not in values:
            values["data_dir"] = self.home / "node"
        if len(problems) > before:
            return None
        try:
            return cls(**values)
        except (ValueError, InvalidArgument, ConfigError) as exc:
            named = [each for each in values if re.search(rf"\b{each}\b", str(exc))]
            where = self._origins[f"{section}.{named[0]}"] if named else self.path
            problems.append(
                ConfigError(
                    f"[{section}] ({where}): {exc}",
                    hint=exc.hint if isinstance(exc, ConfigError | InvalidArgument) else "",
                    code="config.value",
                )
            )
            return None


def _cheap_keys() -> list[tuple[str, str]]:
    """Section and key of every setting whose class is here already."""
    return [
        (section, each.name)
        for section, cls in _SECTIONS.items()
        if isinstance(cls, type)
        for each in _settings(cls)
    ]


def _value(section: str, each: dataclasses.Field[Any], hint: Any, raw: _Raw) -> Any:
    """One converted and checked value; raises ConfigError that says where."""
    key, where = f"{section}.{each.name}", raw.origin
    try:
        value = _convert(hint, raw.value, text=where.kind != "file", base=raw.base)
        _check_range(each, value)
        if (check := cast("Callable[[Any], None] | None", each.metadata.get("check"))) is not None:
            check(value)
    except _Wrong as exc:
        hint = _example(each) if each.default_factory is not dict else f"write [{key}.NAME]"
        hint = "leave it out for the default" if raw.value == "" else hint
        raise _mistyped(key, where, exc.expected, raw.value, hint=hint) from None
    except (InvalidArgument, ValueError) as exc:
        ours = isinstance(exc, InvalidArgument)
        code = exc.code.replace("invalid", "config", 1) if ours else "config.value"  # type: ignore[union-attr]  # `ours` says it
        raise ConfigError(
            f"{_at(key, where)}: {exc}",
            hint=exc.hint if isinstance(exc, InvalidArgument) else "",
            code=code if code != "config" else "config.value",
        ) from None
    return value


def _bounds(each: dataclasses.Field[Any]) -> tuple[float | None, float | None]:
    """The smallest and largest number allowed. Limits and durations are never negative."""
    return each.metadata.get("min", 0), each.metadata.get("max")


def _check_range(each: dataclasses.Field[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = _bounds(each)
    if (low is not None and value < low) or (high is not None and value > high):
        raise InvalidArgument(f"{value} is out of range; {_range_text(each)}", code="invalid.range")


def _range_text(each: dataclasses.Field[Any]) -> str:
    low, high = _bounds(each)
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"{low} or more" if low is not None else f"{high} or less" if high is not None else "any"


def _at(key: str, where: Origin | None) -> str:
    if where is None or where.kind == "default":
        return key
    return f"{key} in {where}" if where.kind == "file" else f"{key} ({where})"


def _example(each: dataclasses.Field[Any]) -> str:
    text = _toml(_default_of(each))
    return f"write it like {each.name} = {text}" if text else ""


def _default_of(each: dataclasses.Field[Any]) -> object:
    if each.default is not dataclasses.MISSING:
        return each.default
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return None


def _mistyped(
    key: str, where: Origin, expected: str, got: object, *, hint: str = ""
) -> ConfigError:
    return ConfigError(
        f"{_at(key, where)}: expected {expected}, got {_got(got)}", hint=hint, code="config.type"
    )


def _unknown(
    what: str, where: Origin | None, why: str, near: str | None, *, hint: str = ""
) -> ConfigError:
    return ConfigError(
        f"{_at(what, where)}: {why}" + (f"; did you mean {near}?" if near else ""),
        hint=hint or "`ww config reference` lists every setting",
        code="config.unknown",
    )


def _nearest(word: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return found[0] if found else None


def file_path(path: Path | None = None, *, env: Mapping[str, str] | None = None) -> Path:
    """Where the configuration file is: `path`, else `WW_CONFIG`, else `$WW_HOME/ww.toml`."""
    env = os.environ if env is None else env
    named = path or paths.variable("WW_CONFIG", env)
    return paths.absolute(named or paths.home(env) / "ww.toml", "the configuration file")


def load(
    flags: Mapping[str, object] | None = None,
    *,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Config:
    """Read the configuration; sections are resolved when they are read.

    Args:
        flags: Dotted key → value as the command line gave it; None means "not given".
        path: The file that `--config` names; it must exist. Default: `WW_CONFIG` (must exist), else
            `$WW_HOME/ww.toml` (may be absent).
        env: The environment; default `os.environ`.

    Raises ConfigError: unreadable file, bad TOML, an unknown section or a misspelt variable.
    """
    env = os.environ if env is None else env
    named = path is not None or "WW_CONFIG" in env
    target = file_path(path, env=env)
    config = Config(paths.home(env), target, _read(target, required=named), env, flags or {})
    config.check_names()
    return config


def defaults() -> Config:
    """The configuration of a machine without a file, variables and flags."""
    home = paths.home({})
    return Config(home, home / "ww.toml", None, {}, {})


# --- the reference ---


def _toml(value: object) -> str:
    """A value as one writes it in TOML; "" for an absent one."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case enum.Enum():
            return _toml(_enum_text(value))
        case list() | tuple() | frozenset():
            items = sorted(value, key=str) if isinstance(value, frozenset) else value
            return "[" + ", ".join(_toml(item) for item in items) + "]"
        case Mapping():
            parts = (f"{_toml_key(str(key))} = {_toml(item)}" for key, item in value.items())
            return "{" + ", ".join(parts) + "}"
        case _:
            # JSON's escapes are TOML's; `ensure_ascii` off keeps names readable.
            import json

            return json.dumps(str(value), ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _plain(value: object) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case enum.Enum():
            return _enum_text(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case frozenset():
            return sorted((_plain(item) for item in value), key=str)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return str(value)


_UNITS: Final = {
    "s": "seconds",
    "ms": "milliseconds",
    "bytes": "bytes",
    "messages": "messages",
    "chars": "characters",
}


def _unit(each: dataclasses.Field[Any]) -> str:
    """From the metadata, or from the name: units come last, before `max` and `min`."""
    if "unit" in each.metadata:
        return str(each.metadata["unit"])
    name = re.sub(r"_(max|min)$", "", each.name)
    return "per second" if name.endswith("_per_s") else _UNITS.get(name.rpartition("_")[2], "")


def _describe_section(section: str, cls: type) -> list[str]:
    hints = _hints(cls)
    summary = (cls.__doc__ or "").strip().splitlines()
    generated = not summary or summary[0].startswith((f"{cls.__name__}(", "Those with a `help`"))
    lines = [f"## [{section}]", "", *([] if generated else [summary[0], ""])]
    if not _settings(cls):
        return [*lines, "No settings.", ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for each in _settings(cls):
        hint = hints[each.name]
        kind = _type_name(hint)
        if unit := _unit(each):
            kind += f", {unit}"
        if any(arg in (int, float) for arg in (hint, *typing.get_args(hint))):
            kind += f"; {_range_text(each)}"
        default = str(each.metadata.get("default", "")) or _toml(_default_of(each)) or "none"
        text = " ".join(str(each.metadata["help"]).split())
        cells = (f"`{each.name}`", kind, f"`{default}`", text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


_REFERENCE_HEAD = """\
<!-- Generated by `ww config reference`. Do not edit. -->

# Configuration reference

A setting is looked up in this order: a flag of the command, a variable of the environment, the
file, the default. `ww config show` prints every effective value and where it came from;
`ww config check` says what is wrong.

The file is `$WW_HOME/ww.toml`, or the one that `--config` or `WW_CONFIG` names. It is TOML:

```toml
[node]
listen = ["/ip4/0.0.0.0/tcp/4001"]

[plugins.pubsub]
```

The variable of a setting is `WW_`, its section and its name in capitals: `[node] data_dir` is
`WW_NODE_DATA_DIR`, and `[plugins.pubsub] x` is `WW_PLUGINS_PUBSUB_X`. A list is separated by
commas; an empty variable is an empty list. A relative path in the file is relative to the file. An
unknown section or setting, a wrong type, a number out of range and an empty text are errors:
nothing is started. To have the default, leave a setting out.

| variable | meaning |
|---|---|
"""


def describe(plugins: Mapping[str, type | None]) -> str:
    """docs/reference/config.md: every section of the core and of `plugins`, as Markdown.

    Args:
        plugins: Name → config class; None for a plugin without settings.
    """
    text = _REFERENCE_HEAD + "".join(f"| `{name}` | {doc} |\n" for name, doc in ENV_OTHER.items())
    lines = [
        "",
        "A plugin's settings are in `[plugins.NAME]`; third-party plugins add their own.",
        "",
    ]
    for section in _SECTIONS:
        lines += _describe_section(section, _section_class(section))
    for name, cls in sorted(plugins.items()):
        if cls is not None:
            lines += _describe_section(f"plugins.{name}", cls)
    return text + "\n".join(lines).rstrip() + "\n"
