"""The effective configuration: which value of a setting wins, and where it came from."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from wetware.base import paths
from wetware.config.convert import Wrong, convert, hints_of, plain, toml
from wetware.config.file import File, Origin, file_path, read
from wetware.config.refusals import at, mistyped, nearest, unknown
from wetware.config.sections import (
    ENV_OTHER,
    ENV_PREFIX,
    SECTIONS,
    NodeConfig,
    PluginsConfig,
    check_range,
    default_of,
    section_class,
    settings_of,
)
from wetware.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from wetware.broker.limits import BrokerLimits, LoginLimits
    from wetware.overlay.admission.limits import AdmissionLimits
    from wetware.overlay.link.limits import LinkLimits

T = TypeVar("T")

_HIDDEN: Final = "(hidden)"
"""Shown in place of a secret."""
_DEFAULT: Final = Origin("default", "default")


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value; a secret is not in it.

    Attributes:
        key: Dotted, e.g. `node.listen` or `plugins.pubsub.topics_max`.
        text: The value as one would write it in ww.toml; "" for an absent one.
        plain: The value as JSON has it.
        origin: Where it came from.
    """

    key: str
    text: str
    plain: object
    origin: Origin


@dataclass(frozen=True, slots=True)
class _Raw:
    value: object
    origin: Origin
    base: Path | None = None  # what a relative path is relative to; None: the working directory


class Config:
    """The effective configuration. Make one with `load`; sections resolve when first read.

    Attributes:
        home: `WW_HOME`: everything of a user lives there.
        path: The configuration file, whether it exists or not.
    """

    def __init__(
        self, home: Path, file: File, env: Mapping[str, str], flags: Mapping[str, object]
    ) -> None:
        self.home, self.path, self.exists = home, file.path, file.exists
        self._file = file
        self._env = {key: value for key, value in env.items() if key.startswith(ENV_PREFIX)}
        self._flags = {key: value for key, value in flags.items() if value is not None}
        self._resolved: dict[str, tuple[Any, list[ConfigError]]] = {}
        self._origins: dict[str, Origin] = {}

    # Each raises ConfigError if the section is wrong.

    @property
    def node(self) -> NodeConfig:
        return self._section("node", NodeConfig)

    @property
    def login(self) -> LoginLimits:
        return cast("LoginLimits", self._section("login", section_class("login")))

    @property
    def broker(self) -> BrokerLimits:
        return cast("BrokerLimits", self._section("broker", section_class("broker")))

    @property
    def admission(self) -> AdmissionLimits:
        return cast("AdmissionLimits", self._section("admission", section_class("admission")))

    @property
    def link(self) -> LinkLimits:
        return cast("LinkLimits", self._section("link", section_class("link")))

    @property
    def plugins(self) -> PluginsConfig:
        """Without the plugins' own sections."""
        return self._section("plugins", PluginsConfig)

    @property
    def keys_dir(self) -> Path:
        return self.home / "keys"

    def plugin(self, name: str, cls: type[T]) -> T:
        """`[plugins.NAME]` as an instance of the plugin's own dataclass; raises ConfigError.

        `cls` has passed `check_schema`.
        """
        return self._section(f"plugins.{name}", cls)

    def origin(self, key: str) -> Origin:
        """Where a setting of a resolved section came from; raises KeyError for an unknown one."""
        return self._origins[key]

    def given(self, section: str) -> frozenset[str]:
        """The settings of a resolved section that somebody gave: all others are defaults."""
        keys = (
            key.rpartition(".") for key, origin in self._origins.items() if origin.kind != "default"
        )
        return frozenset(name for head, _, name in keys if head == section)

    def settings(self, plugins: Mapping[str, type | None]) -> tuple[Setting, ...]:
        """Every effective value and where it came from; raises the first ConfigError."""
        found = []
        for section, cls in _classes(plugins).items():
            resolved: object = self._section(section, cls)
            for name, each in settings_of(cls).items():
                key, value = f"{section}.{name}", getattr(resolved, name)
                hidden = each.metadata.get("secret") and value
                text, shown = (_HIDDEN, _HIDDEN) if hidden else (toml(value), plain(value))
                found.append(Setting(key, text, shown, self._origins[key]))
        return tuple(found)

    def problems(self, plugins: Mapping[str, type | None] | None = None) -> list[ConfigError]:
        """Everything that is wrong, in the order in which one would fix it.

        Args:
            plugins: Name → config class of every installed plugin; None where the class is not
                known, e.g. of a disabled one. Without it, plugins' sections are not judged.
        """
        found = self.unknown_sections()
        for section, cls in _classes(plugins or {}).items():
            found += self._resolve(section, cls)[1]
        return found if plugins is None else [*found, *self.unknown_plugins(plugins)]

    def unknown_plugins(self, plugins: Mapping[str, type | None]) -> list[ConfigError]:
        """Sections of no installed plugin, and variables that are no setting of anybody."""
        settings = settings_of(PluginsConfig)
        found = [
            unknown(
                f"[plugins.{key}]",
                self._file.where("plugins", key),
                plugins,
                why="no installed plugin is called so",
                hint="`ww plugin list` shows the installed ones",
            )
            for key, value in self._table("plugins").items()
            if isinstance(value, dict) and key not in plugins and key not in settings
        ]
        # `WW_PLUGINS_AUTH_X` may belong to a plugin `auth` or to a plugin `auth_x`: variables are
        # judged with all plugins known.
        known = {_variable("plugins", key) for key in settings}
        closed: list[str] = []
        for name, cls in plugins.items():
            if cls is None:
                closed.append(_variable("plugins", name, ""))
            else:
                known |= {_variable("plugins", name, key) for key in settings_of(cls)}
        # What is no setting, of plugins or of tests, has one word; other sections judge their own.
        judged = (_variable(section, "") for section in SECTIONS if section != "plugins")
        elsewhere = (*judged, *closed)
        hint = "unset it, or correct it: `ww config reference` lists every setting"
        found += [
            unknown(name, None, known, why="nothing installed has this setting", hint=hint)
            for name in self._env
            if "_" in name.removeprefix(ENV_PREFIX)
            and name not in known | ENV_OTHER.keys()
            and not name.startswith(elsewhere)
        ]
        return found

    # --- resolving -------------------------------------------------------------------------------

    def unknown_sections(self) -> list[ConfigError]:
        """Sections and variables that belong to nothing."""
        found: list[ConfigError] = []
        for key, value in self._file.data.items():
            where = self._file.where(key)
            if key not in SECTIONS:
                kind = f"[{key}]" if isinstance(value, dict) else key
                found.append(unknown(kind, where, SECTIONS, why="no such section"))
            elif not isinstance(value, dict):
                found.append(mistyped(key, where, "a section", value, hint=f"write [{key}]"))
        prefixes = tuple(_variable(section, "") for section in SECTIONS)
        known = [*ENV_OTHER, *(_variable("node", name) for name in settings_of(NodeConfig))]
        for name in self._env:
            # A misspelt variable is an error to every command, any other unknown one to a node.
            ours = name in ENV_OTHER or name.startswith(prefixes)
            if not ours and nearest(name, known, 0.8):
                found.append(unknown(name, None, known))
        return found

    def _table(self, section: str) -> dict[str, Any]:
        """A section of the file; {} for one that is no section, which is reported elsewhere."""
        table: Any = self._file.data
        for key in section.split("."):
            table = table.get(key)
            if not isinstance(table, dict):
                return {}
        return cast("dict[str, Any]", table)

    def _section(self, section: str, cls: type[T]) -> T:
        value, problems = self._resolve(section, cls)
        if problems:
            raise problems[0]
        return cast("T", value)

    def _resolve(self, section: str, cls: type[T]) -> tuple[T | None, list[ConfigError]]:
        """Once: what a plugin checks is bounded where the loader asks first, and only there."""
        if section not in self._resolved:
            self._resolved[section] = self._judge(section, cls)
        return self._resolved[section]

    def _judge(self, section: str, cls: type[T]) -> tuple[T | None, list[ConfigError]]:
        raws, problems = self._given(section, cls)
        hints = hints_of(cls)
        values: dict[str, Any] = {}
        for name, each in settings_of(cls).items():
            raw = raws.get(name)
            self._origins[f"{section}.{name}"] = raw.origin if raw else _DEFAULT
            if raw is not None:
                try:
                    values[name] = self._value(f"{section}.{name}", each, hints[name], raw)
                except ConfigError as exc:
                    problems.append(exc)
        if section == "node":
            values.setdefault("data_dir", self.home / "node")
        if problems:
            return None, problems
        try:
            return cls(**values), []
        except (ValueError, InvalidArgument, ConfigError) as exc:
            named = [name for name in values if re.search(rf"\b{name}\b", str(exc))]
            where = self._origins[f"{section}.{named[0]}"] if named else self.path
            return None, [_refused(f"[{section}] ({where})", exc)]

    def _given(self, section: str, cls: type) -> tuple[dict[str, _Raw], list[ConfigError]]:
        """Name → the value that wins, unconverted; and what is wrong with names."""
        settings = settings_of(cls)
        found: dict[str, _Raw] = {}
        problems: list[ConfigError] = []
        for key, value in self._table(section).items():
            where = self._file.where(*section.split("."), key)
            if key in settings:
                found[key] = _Raw(value, where, self.path.parent)
            elif section != "plugins":
                problems.append(unknown(f"{section}.{key}", where, settings))
            elif not isinstance(value, dict):
                hint = "the settings of a plugin are a section of their own: [plugins.NAME]"
                problems.append(unknown(f"plugins.{key}", where, settings, hint=hint))
        variables = {_variable(section, name): name for name in settings}
        for variable, text in self._env.items():
            if variable in variables:
                found[variables[variable]] = _Raw(text, Origin("env", variable))
            elif variable.startswith(_variable(section, "")) and not section.startswith("plugins"):
                problems.append(unknown(variable, None, variables))
        for key, value in self._flags.items():
            head, _, name = key.rpartition(".")
            if head == section:
                flag = settings[name].metadata.get("flag") or "--" + name.replace("_", "-")
                found[name] = _Raw(value, Origin("flag", flag))
        return found, problems

    def _value(self, key: str, each: dataclasses.Field[Any], hint: Any, raw: _Raw) -> Any:
        """One converted and checked value; raises ConfigError that says where."""
        where = raw.origin
        try:
            value = convert(hint, raw.value, text=where.kind != "file", base=raw.base)
            check_range(each, value)
            if (check := each.metadata.get("check")) is not None:
                check(value)
        except Wrong as exc:
            default = default_of(each)
            if raw.value == "":
                advice = "leave it out for the default"
            elif each.default_factory is dict:
                advice = f"write [{key}.NAME]"
            else:  # an empty default may be no value that one could write
                advice = f"write it like {each.name} = {toml(default)}" if default else ""
            got = _HIDDEN if each.metadata.get("secret") else raw.value
            raise mistyped(key, where, exc.expected, got, hint=advice) from None
        except (InvalidArgument, ValueError) as exc:
            if each.default_factory is dict:
                entry = str(exc).partition(":")[0]
                where = self._file.where(*key.split("."), *entry.split("."))
            raise _refused(at(key, where), exc) from None
        return value


def _classes(plugins: Mapping[str, type | None]) -> dict[str, type]:
    """Section → class, of the core and of the plugins whose class is known."""
    found = {name: section_class(name) for name in SECTIONS}
    return found | {f"plugins.{name}": cls for name, cls in plugins.items() if cls is not None}


def _variable(*key: str) -> str:
    """The variable of a setting: `node`, `data_dir` → `WW_NODE_DATA_DIR`."""
    return ENV_PREFIX + "_".join(key).replace(".", "_").replace("-", "_").upper()


def _refused(where: str, exc: Exception) -> ConfigError:
    """What a check says of a value, as an error of the configuration."""
    ours = exc if isinstance(exc, InvalidArgument | ConfigError) else None
    code = ours.code.replace("invalid", "config", 1) if ours else "config"
    return ConfigError(
        f"{where}: {exc}",
        hint=ours.hint if ours else "",
        code="config.value" if code == "config" else code,
    )


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
    file = read(file_path(path, env=env), required=named)
    config = Config(paths.home(env), file, env, flags or {})
    if problems := config.unknown_sections():
        raise problems[0]
    return config


def defaults() -> Config:
    """The configuration of a machine without a file, variables and flags."""
    home = paths.home({})
    return Config(home, File(home / "ww.toml", "", exists=False), {}, {})
