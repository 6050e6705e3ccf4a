"""Find → select → load → check config → call hooks → report.

An own loader over entry points, because pluggy's stops at the first broken plugin with nothing
registered and skips a duplicate name silently. Here every plugin stands alone: an exception, a
`sys.exit` or a hang in its import or in one of its hooks makes *it* failed, and the others go on.

This is fault isolation and not security: an installed plugin has the authority of the process, and
code that never returns to the interpreter, or ends the process, cannot be stopped from here. Load
only what you trust, and name it in `[plugins] enable`.

The dist-info folders are read here: `importlib.metadata` costs 40 ms of import in every command.
Source: https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import importlib
import inspect
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pluggy

from wetware import __version__, hookspecs
from wetware.base.log import get_logger
from wetware.config import Config, NoSettings, check_schema
from wetware.config import load as load_config
from wetware.errors import ConfigError, PluginError, WetwareError
from wetware.hookspecs import GROUP, PROJECT

if TYPE_CHECKING:
    import types

    import typer

    from wetware.broker.proposals import Proposal
    from wetware.hookspecs import AuthBackend, Discovery, PluginContext, Recorder, Service

T = TypeVar("T")
ContextFor = Callable[[str, object], "PluginContext"]
"""(plugin, its configuration or None) → what its hooks are given."""

log = get_logger("plugins")

ENTRY_POINTS_BYTES_MAX: Final = 1 << 20
"""An entry_points.txt or the head of a METADATA; more is no metadata."""
PLUGINS_MAX: Final = 256
"""Entry points of our groups in one environment."""
NO_RECORDER: Final = "none"
"""In `[node] audit`: decisions are not recorded."""
_AUTH: Final = "auth_"
"""The name of an auth backend's plugin begins so, and people leave it out."""
SERVICES_PER_PLUGIN_MAX: Final = 32
COMMANDS_PER_PLUGIN_MAX: Final = 64
REASON_CHARS_MAX: Final = 400

HOOKS: Final = tuple(sorted(name for name in vars(hookspecs) if name.startswith("ww_")))
"""The hooks of API v1."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_RESERVED: Final = frozenset({"enable", "disable"})  # settings of [plugins]
_VERSIONED = re.compile(r"wetware\.(v\d+)\Z")


@dataclass(frozen=True, slots=True)
class Policy:
    """How plugins are loaded.

    Attributes:
        strict: A plugin that the configuration names and that fails raises PluginError.
        configure: Resolve `[plugins.NAME]`.
        hook_s_max: How long the import or one hook of a plugin may take.
    """

    strict: bool
    configure: bool
    hook_s_max: float


NODE: Final = Policy(strict=True, configure=True, hook_s_max=10.0)
"""For `ww node`: a plugin may compile its schema or open its store."""
REQUIRED_S_MAX: Final = 60.0
"""The same for one without which the node does not start: there is nothing to go on with, and what
takes seconds on an idle machine, as a chain to try out, has to fit on a slow one under load."""
STILL_S: Final = 10.0
"""After that the log says which plugin is waited for."""
CLI: Final = Policy(strict=False, configure=False, hook_s_max=5.0)
"""For mounting commands: a person waits, and a broken plugin must not break `ww`."""
INSPECT: Final = Policy(strict=False, configure=True, hook_s_max=10.0)
"""For `ww plugin list` and `ww config`: report everything, raise nothing."""


class State(enum.StrEnum):
    """What became of a plugin."""

    LOADED = "loaded"
    DISABLED = "disabled"
    """The configuration does not want it; nothing of it was imported."""
    UNAVAILABLE = "unavailable"
    """Something that it needs is not installed; the remedy says what to install."""
    FAILED = "failed"
    """It is broken, or was refused."""


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """One line of `ww plugin list`.

    Attributes:
        name: The entry point's name.
        dist: The distribution that offers it; "" if none does.
        version: The distribution's version.
        bundled: Whether it comes with wetware itself.
        state: What became of it.
        reason: Why it is not loaded; "" for a loaded one.
        remedy: What mends it; "" where nothing is known.
        hooks: The hooks that it implements, if it was imported.
        services: The services that it offers, once asked for.
    """

    name: str
    dist: str
    version: str
    bundled: bool
    state: State
    reason: str = ""
    remedy: str = ""
    hooks: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


# --- find ---


@dataclass(frozen=True, slots=True)
class Offer:
    """An entry point of a group `wetware.v…`.

    Attributes:
        group: e.g. "wetware.v1".
        name: The plugin's name.
        value: `module` or `module:attribute`.
        dist: The distribution's name.
        version: The distribution's version.
        extras: The distribution's extras.
        requires: Its `Requires-Dist` lines.
    """

    group: str
    name: str
    value: str
    dist: str
    version: str
    extras: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    @property
    def bundled(self) -> bool:
        return _canonical(self.dist) == PROJECT

    @property
    def package(self) -> str:
        return re.split(r"[.:]", self.value, maxsplit=1)[0].strip()

    @property
    def label(self) -> str:
        return f"{self.dist} {self.version}".strip()


def _check_fit(offer: Offer) -> None:
    """Raises _Unusable where a distribution requires another wetware than this one.

    pip sees to it when it installs; `--no-deps`, and an upgrade of wetware alone, go past it.
    """
    if offer.bundled:
        return
    from packaging.requirements import InvalidRequirement, Requirement

    for line in offer.requires:
        try:
            needs = Requirement(line)
        except InvalidRequirement:
            continue  # pip does not install such
        if _canonical(needs.name) != PROJECT:
            continue
        applies = needs.marker is None or needs.marker.evaluate({"extra": ""})
        if applies and not needs.specifier.contains(__version__, prereleases=True):
            raise _Unusable(
                State.UNAVAILABLE,
                f"needs wetware {needs.specifier}; this is {__version__}",
                f"pip install --upgrade wetware {offer.dist}",
            )


def is_plugin_name(name: str) -> bool:
    """Whether a plugin may have the name."""
    return bool(_NAME.match(name)) and name not in _RESERVED


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find(paths: Iterable[str] | None = None) -> tuple[Offer, ...]:
    """Every entry point of a group `wetware.v…`, bundled ones first, in an order that never varies.

    Unreadable metadata is skipped and logged. Of two distributions of one name the
    first on the path counts, as in an import.

    Args:
        paths: Folders; default `sys.path`.
    """
    found: list[Offer] = []
    seen: set[str] = set()
    for folder in dict.fromkeys(sys.path if paths is None else paths):
        try:
            with os.scandir(folder or ".") as entries:
                names = sorted(
                    e.name for e in entries if e.name.endswith((".dist-info", ".egg-info"))
                )
        except OSError:
            continue  # zip files and folders that do not exist are normal in sys.path
        for name in names:
            info = Path(folder or ".", name)
            try:
                offers = _read_dist(info)
            except OSError as exc:
                log.debug("plugin.metadata_unreadable", path=info, error=exc)
                continue
            if offers and (key := _canonical(offers[0].dist)) not in seen:
                seen.add(key)
                found += offers
    found.sort(key=lambda o: (not o.bundled, _canonical(o.dist), o.name, o.group, o.value))
    if len(found) > PLUGINS_MAX:
        log.warning("plugin.too_many", found=len(found), limit=PLUGINS_MAX)
    return tuple(found[:PLUGINS_MAX])


def _read_dist(info: Path) -> list[Offer]:
    text = _read_head(info / "entry_points.txt")
    if text is None or f"{PROJECT}.v" not in text:
        return []
    points: list[tuple[str, str, str]] = []
    group = ""
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif line and not line.startswith("#") and _VERSIONED.match(group):
            name, _, value = line.partition("=")  # a line without "=" is reported by its name
            points.append((group, name.strip(), value.partition("[")[0].strip()))
    if not points:
        return []
    head = _read_head(info / "METADATA") or _read_head(info / "PKG-INFO") or ""
    fields: dict[str, list[str]] = {}
    for line in head.splitlines():
        if not line.strip():
            break  # the description follows
        key, colon, rest = line.partition(":")
        if colon and key and not key[0].isspace():
            fields.setdefault(key.lower(), []).append(rest.strip())
    dist = fields.get("name", [info.stem.partition("-")[0]])[0]
    version = fields.get("version", [""])[0]
    extras = tuple(fields.get("provides-extra", ()))
    requires = tuple(fields.get("requires-dist", ()))
    return [
        Offer(group, name, value, dist, version, extras, requires) for group, name, value in points
    ]


def _read_head(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(ENTRY_POINTS_BYTES_MAX).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


# --- bounded calls ---


class _Hung(BaseException):
    """A plugin took longer than its limit. No `except Exception` of the plugin catches it."""


_AGAIN_S: Final = 0.25
"""A plugin that swallows the first interruption gets another one."""


def _shared_import(frame: types.FrameType | None) -> bool:
    """Whether what is not a plugin's alone is being imported at `frame`.

    The import machinery itself is at work, or a module of the standard library or of wetware, with
    all that it imports. Cut off there, it would be half imported for the whole process.
    """
    within = False
    while frame is not None and frame.f_code is not bounded.__code__:
        if frame.f_code.co_name == "<module>":
            within = True
            top = str(frame.f_globals.get("__name__")).partition(".")[0]
            if top == PROJECT or top in sys.stdlib_module_names:
                return True
        elif not within and frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _forget_orphans(known: Set[str]) -> None:
    """Forget new submodules whose package is not there: its import failed.

    It would be imported again without them, and miss the names that importing them gives it.
    """
    for name in sorted(sys.modules.keys() - known):
        if "." in name and name.rpartition(".")[0] not in sys.modules:
            del sys.modules[name]


def bounded(call: Callable[[], T], limit_s: float, still: Callable[[], None] = lambda: None) -> T:
    """Run a synchronous call of foreign code for at most `limit_s`; raises _Hung after that.

    After STILL_S `still` is called, once, while the call goes on. What the process shares is
    imported to its end before the call is cut off.

    A timer signal interrupts it, so it works in the main thread only; elsewhere the call runs
    unguarded. It reaches Python code and interruptible system calls, not a loop inside a C
    extension. The signal handler and timer that were there before are restored. What the call
    prints goes to stderr: it would corrupt the output of `--json`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if threading.current_thread() is not threading.main_thread():
            return call()
        armed, said = False, limit_s <= STILL_S

        def interrupt(_signum: int, frame: types.FrameType | None) -> None:
            nonlocal said
            if not armed:
                return
            if said:
                if _shared_import(frame):
                    return
                raise _Hung
            said = True
            signal.setitimer(signal.ITIMER_REAL, limit_s - STILL_S, _AGAIN_S)
            still()

        handler = signal.signal(signal.SIGALRM, interrupt)
        started = time.monotonic()
        first_s = min(STILL_S, limit_s)
        left_s, every_s = signal.setitimer(signal.ITIMER_REAL, first_s, _AGAIN_S)
        try:
            armed = True
            return call()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left_s:
                # A timer that was due meanwhile fires now.
                left_s = max(left_s - (time.monotonic() - started), 1e-6)
                signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


class _Unusable(Exception):
    """A plugin cannot be used; carries what the report says."""

    def __init__(self, state: State, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.state, self.reason, self.remedy = state, reason, remedy
        self.cause: BaseException | None = None


def _one_line(text: str) -> str:
    """Foreign text, fit for a report: one line, printable, bounded."""
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= REASON_CHARS_MAX else line[: REASON_CHARS_MAX - 1] + "…"


def _explain(exc: BaseException, offer: Offer, what: str, limit_s: float) -> _Unusable:
    """What to report for an exception of a plugin."""
    if isinstance(exc, _Hung):
        return _Unusable(
            State.FAILED, f"hung {what}: not done after {limit_s:g} s", _report_to(offer)
        )
    if isinstance(exc, pluggy.PluginValidationError):
        return _Unusable(State.FAILED, _one_line(str(exc).splitlines()[-1]), _report_to(offer))
    if isinstance(exc, ImportError) and exc.name:
        top = exc.name.partition(".")[0]
        if top == PROJECT:
            return _Unusable(
                State.FAILED,
                _one_line(f"does not fit this version of wetware: {exc}"),
                f"pip install --upgrade wetware {offer.dist}",
            )
        if top == offer.package:
            return _Unusable(
                State.FAILED,
                _one_line(f"{exc}: the installation of {offer.label} is incomplete"),
                f"pip install --force-reinstall {offer.dist}",
            )
        if isinstance(exc, ModuleNotFoundError):
            return _Unusable(
                State.UNAVAILABLE,
                f"needs {_one_line(exc.name)!r}, which is not installed",
                _pip_hint(offer, top),
            )
        return _Unusable(
            State.UNAVAILABLE,
            _one_line(f"cannot use the installed {top!r}: {exc}"),
            _pip_hint(offer, top, upgrade=True),
        )
    if isinstance(exc, SystemExit):
        return _Unusable(State.FAILED, f"called sys.exit {what}", _report_to(offer))
    if isinstance(exc, WetwareError):
        return _Unusable(
            State.FAILED,
            _one_line(f"{what}: {exc.message}" if what else exc.message),
            _one_line(exc.hint) or _report_to(offer),
        )
    try:
        text = str(exc)
    except Exception:  # foreign code, once more
        text = "(an exception that cannot be printed)"
    kind = type(exc).__name__
    reason = _one_line(": ".join(filter(None, (what, kind, text))))
    from wetware.base.disk import remedy  # not in every command's start

    return _Unusable(State.FAILED, reason + _place(exc), remedy(exc) or _report_to(offer))


def _place(exc: BaseException) -> str:
    """The last line of the plugin's that ran, e.g. " (plugin.py:12)"."""
    place, tb = "", exc.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if file not in (__file__, importlib.__file__) and not file.startswith("<frozen"):
            place = f" ({os.path.basename(file)}:{tb.tb_lineno})"
        tb = tb.tb_next
    return place


def _report_to(offer: Offer) -> str:
    if offer.bundled:
        return "this is a defect of wetware; please report it"
    return f"tell the authors of {offer.dist}; until then: pip uninstall {offer.dist}"


def _pip_hint(offer: Offer, module: str, *, upgrade: bool = False) -> str:
    """The `pip install` that brings a missing module, from the distribution's own metadata.

    Never `pip install MODULE` from a guess: the name may be somebody else's distribution.
    """
    pip = "pip install --upgrade" if upgrade else "pip install"
    listed: list[str] = []
    for requirement in offer.requires:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None or _canonical(name[0]) != _canonical(module):
            continue
        extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", requirement)
        if extra is None:
            return f"{pip} {name[0]}"
        listed.append(extra[1])
    own = [_canonical(offer.name), _canonical(offer.name.removeprefix(_AUTH))]
    candidates = [
        *(extra for extra in listed if _canonical(extra) in own),
        *(extra for extra in listed if extra not in ("all", "dev")),
        *(extra for extra in offer.extras if _canonical(extra) in own),
        *listed,
    ]
    if candidates:
        return f"{pip} '{offer.dist}[{candidates[0]}]'"
    return f"{offer.dist} does not say what provides {module!r}; ask its authors"


# --- one plugin ---


@dataclass(slots=True, eq=False)
class _Entry:
    offer: Offer
    state: State = State.FAILED
    reason: str = ""
    remedy: str = ""
    hooks: dict[str, pluggy.HookImpl] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    schema: type | None = None
    config: object = None

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def loaded(self) -> bool:
        return self.state is State.LOADED


class Plugins:
    """The plugins of this process. Make one with `load`. Not thread-safe."""

    def __init__(self, config: Config, policy: Policy, offers: tuple[Offer, ...]) -> None:
        self._config = config
        self._policy = policy
        self._offers = offers
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(hookspecs)
        self._entries: list[_Entry] = []
        self._taken: dict[str, _Entry] = {}
        self.proposals: dict[str, Proposal] = {}
        """What each service proposes for the standard roles, as it was judged by `services`."""
        self._required: frozenset[str] = frozenset()
        self._problems: list[ConfigError] = []

    # --- loading ---------------------------------------------------------------------------------

    def _load(self) -> None:
        enable, disable = self._config.plugins.enable, self._config.plugins.disable
        # Reading [node] costs an import that mounting commands does without.
        judged = self._policy.strict or self._policy.configure
        selected = self._selected() if enable is not None or judged else {}
        chosen = {name for name in selected.values() if name is not None}
        wanted = None if enable is None else {*enable, *chosen}
        self._required = frozenset({*(enable or ()), *chosen})
        if judged:
            self._judge_selection(enable or (), disable, selected)
        for offer in self._offers:
            entry = _Entry(offer)
            self._entries.append(entry)
            try:
                self._load_one(entry, wanted, disable)
            except _Unusable as exc:
                self._fail(entry, exc)
        self._report_missing(enable)
        if self._policy.configure:
            self._configure()
        for entry in self._entries:
            self._log(entry)

    def _judge_selection(
        self,
        enable: tuple[str, ...],
        disable: tuple[str, ...],
        selected: Mapping[str, str | None],
    ) -> None:
        for setting, name in selected.items():
            if name is None:
                self._problem(self._no_backend() if setting == "auth" else self._no_recorder())
            elif name in disable:
                where = self._config.origin("plugins.disable")
                self._problem(
                    ConfigError(
                        f"[node] {setting} selects {name!r}, and [plugins] disable ({where}) "
                        "forbids it",
                        hint=f"select another one with [node] {setting}, or take it out of "
                        "`disable`",
                        code="config.value",
                    )
                )
        installed = {offer.name for offer in self._offers}
        for name in disable:
            near = difflib.get_close_matches(name, installed, 1, 0.6)
            if name not in installed and near:
                # What was meant would stay enabled: a misspelt denial must not become a permission.
                where = self._config.origin("plugins.disable")
                self._problem(
                    ConfigError(
                        f"[plugins] disable ({where}): no plugin {name!r}; did you mean {near[0]}?",
                        hint="`ww plugin list` shows the installed ones",
                        code="config.unknown",
                    )
                )
        for name in enable:
            if name not in installed:
                where = self._config.origin("plugins.enable")
                self._problem(
                    PluginError(
                        f"[plugins] enable ({where}): the plugin {name!r} is not installed",
                        hint=self._install_hint(name),
                        code="plugin.missing",
                    )
                )

    def _problem(self, problem: ConfigError) -> None:
        """What stops a node; elsewhere it is reported."""
        if self._policy.strict:
            raise problem
        self._problems.append(problem)

    @property
    def problems(self) -> tuple[ConfigError, ...]:
        """What would stop a node with this configuration, the plugins' settings aside."""
        return tuple(self._problems)

    def _report_missing(self, enable: tuple[str, ...] | None) -> None:
        for name in enable or ():
            if name not in self._taken:
                offer = Offer(GROUP, name, "", "", "")
                remedy = self._install_hint(name)
                self._entries.append(
                    _Entry(offer, State.UNAVAILABLE, "is enabled and not installed", remedy)
                )

    def _install_hint(self, name: str) -> str:
        installed = sorted({offer.name for offer in self._offers if offer.group == GROUP})
        if name.startswith(_AUTH):
            installed = [each for each in installed if each.startswith(_AUTH)]
        # Without the prefix, which would make any two backends look alike.
        plain = {each.removeprefix(_AUTH): each for each in installed}
        if near := difflib.get_close_matches(name.removeprefix(_AUTH), plain, 1, 0.6):
            return f"did you mean {plain[near[0]]}?"
        for offer in self._offers:
            for extra in offer.extras:
                if offer.bundled and extra in (name, name.removeprefix(_AUTH)):
                    return f"pip install '{offer.dist}[{extra}]'"
        return (
            f"pip install the distribution that offers the plugin {name!r}; installed are "
            f"{', '.join(installed)}"
        )

    def _load_one(self, entry: _Entry, wanted: set[str] | None, disable: tuple[str, ...]) -> None:
        offer = entry.offer
        if offer.group != GROUP:
            ours, theirs = GROUP.rpartition(".")[2], offer.group.rpartition(".")[2]
            if any(
                o.group == GROUP and (o.dist, o.name) == (offer.dist, offer.name)
                for o in self._offers
            ):
                self._entries.remove(entry)  # it speaks both
                return
            newer = int(theirs[1:]) > int(ours[1:])
            raise _Unusable(
                State.UNAVAILABLE,
                f"is written for hook API {theirs}; this wetware speaks {ours}",
                "pip install --upgrade wetware" if newer else f"pip install --upgrade {offer.dist}",
            )
        if not is_plugin_name(offer.name):
            raise _Unusable(
                State.FAILED,
                _one_line(f"{offer.name!r} is not a plugin's name: a-z, 0-9 and _, at most 64"),
                _report_to(offer),
            )
        if (other := self._taken.get(offer.name)) is not None:
            raise _Unusable(
                State.FAILED,
                f"the name {offer.name!r} is taken by {other.offer.label}, which comes first",
                f"pip uninstall {offer.dist}" if not offer.bundled else _report_to(offer),
            )
        self._taken[offer.name] = entry
        if offer.name in disable:
            raise _Unusable(
                State.DISABLED, f"by [plugins] disable ({self._config.origin('plugins.disable')})"
            )
        if wanted is not None and offer.name not in wanted:
            raise _Unusable(
                State.DISABLED,
                f"not in [plugins] enable ({self._config.origin('plugins.enable')})",
                f"add {offer.name!r} to it",
            )
        if (
            self._policy.strict or self._policy.configure
        ):  # its import takes 30 ms: not in every `ww`
            _check_fit(offer)
        plugin = self._guard(entry, "on import", lambda: _import(offer))
        entry.hooks = self._guard(entry, "", lambda: self._register(offer, plugin))
        entry.state = State.LOADED

    def _register(self, offer: Offer, plugin: object) -> dict[str, pluggy.HookImpl]:
        for name in dir(plugin):
            if not name.startswith("ww_") or self._pm.parse_hookimpl_opts(plugin, name) is not None:
                continue
            member = inspect.getattr_static(plugin, name)
            if inspect.isroutine(member) and not hasattr(member, f"{PROJECT}_spec"):
                raise PluginError(
                    f"{name} is not marked with @hookimpl" if name in HOOKS else _no_hook(name)
                )
        if (known := self._pm.get_name(plugin)) is not None:
            raise PluginError(f"is the same object as the plugin {known!r}")
        self._pm.register(plugin, name=offer.name)
        found: dict[str, pluggy.HookImpl] = {}
        for caller in self._pm.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                if not caller.has_spec():
                    if impl.optionalhook:
                        continue
                    raise PluginError(_no_hook(caller.name))
                if impl.wrapper or impl.hookwrapper:
                    raise PluginError(f"{caller.name} is a wrapper; hook API v1 has none")
                if inspect.iscoroutinefunction(impl.function):
                    raise PluginError(
                        f"{caller.name} is async; a hook declares, and what it returns is async"
                    )
                found[caller.name] = impl
        return found

    def _configure(self) -> None:
        for entry in self._entries:
            if not entry.loaded:
                continue
            try:
                entry.schema = NoSettings
                if "ww_register_config" in entry.hooks:
                    made: object = self._call(entry, "ww_register_config", _as_is)
                    entry.schema = NoSettings if made is None else self._check(entry, made)
                value: object = self._config.plugin(entry.name, entry.schema)
                entry.config = None if entry.schema is NoSettings else value
            except _Unusable as exc:
                entry.schema = None
                self._fail(entry, exc)
            except ConfigError as exc:
                # The operator's mistake, not the plugin's: in a node it stops the start.
                if self._policy.strict:
                    raise
                self._end(entry, _Unusable(State.FAILED, exc.message, exc.hint))
        if self._policy.strict and (problems := self._config.unknown_plugins(self.schemas)):
            raise problems[0]

    def _check(self, entry: _Entry, made: object) -> type:
        return self._guard(entry, "in ww_register_config", lambda: check_schema(made))

    # --- calling ---------------------------------------------------------------------------------

    def _guard(self, entry: _Entry, what: str, call: Callable[[], T]) -> T:
        needed = self._policy.strict and entry.name in self._required
        limit_s = REQUIRED_S_MAX if needed else self._policy.hook_s_max

        def still() -> None:
            waits = {"plugin": entry.name, "where": what}
            log.info("plugin.still_waiting", **waits, after_s=STILL_S, at_most_s=limit_s)

        known = set(sys.modules)
        try:
            return bounded(call, limit_s, still)
        except KeyboardInterrupt:
            raise  # the person at the terminal
        except BaseException as exc:
            _forget_orphans(known)
            log.debug("plugin.raised", plugin=entry.name, exc_info=exc)
            unusable = _explain(exc, entry.offer, what, limit_s)
            unusable.cause = exc
            raise unusable from None

    def _call(
        self,
        entry: _Entry,
        hook: str,
        judge: Callable[[Any], T],
        **kwargs: object,
    ) -> T:
        """Call one plugin's hook. `judge` runs inside the guard: a result is foreign code too."""
        impl = entry.hooks[hook]
        args = [kwargs[name] for name in impl.argnames]
        return self._guard(entry, f"in {hook}", lambda: judge(impl.function(*args)))

    def _fail(self, entry: _Entry, exc: _Unusable) -> None:
        self._end(entry, exc)
        # A second plugin of a required name is a stranger.
        first = self._taken.get(entry.name, entry) is entry
        if first and entry.name in self._required and entry.state is not State.DISABLED:
            label = f"{entry.name!r} ({entry.offer.label})"
            self._problem(
                PluginError(
                    f"the plugin {label} is {exc.state}: {exc.reason}",
                    hint=exc.remedy,
                    code=f"plugin.{exc.state}",
                )
            )

    def _end(self, entry: _Entry, exc: _Unusable) -> None:
        entry.state, entry.reason, entry.remedy = exc.state, exc.reason, exc.remedy
        if self._taken.get(entry.name) is entry and self._pm.has_plugin(entry.name):
            self._pm.unregister(name=entry.name)

    def _log(self, entry: _Entry) -> None:
        status = {"plugin": entry.name, "dist": entry.offer.label, "reason": entry.reason}
        if entry.remedy:
            status["remedy"] = entry.remedy
        if not self._policy.strict or entry.state in (State.LOADED, State.DISABLED):
            log.debug(f"plugin.{entry.state}", **status)
        elif entry.state is State.UNAVAILABLE and entry.offer.bundled:
            log.info("plugin.unavailable", **status)  # an extra that nobody asked for
        else:
            log.warning(f"plugin.{entry.state}", **status)

    def _each(self, hook: str) -> Iterable[_Entry]:
        """The loaded plugins that implement a hook."""
        return [entry for entry in self._entries if entry.loaded and hook in entry.hooks]

    # --- the report ------------------------------------------------------------------------------

    @property
    def report(self) -> tuple[PluginStatus, ...]:
        """Every plugin that is installed or enabled, bundled ones first."""
        return tuple(
            PluginStatus(
                entry.name,
                entry.offer.dist,
                entry.offer.version,
                entry.offer.bundled,
                entry.state,
                entry.reason,
                entry.remedy,
                tuple(sorted(entry.hooks)),
                entry.services,
            )
            for entry in self._entries
        )

    @property
    def schemas(self) -> dict[str, type | None]:
        """Name → config class of every installed plugin; None where it is not known."""
        return {name: entry.schema for name, entry in self._taken.items()}

    def config(self, name: str) -> object:
        """The configuration of a loaded plugin, or None if it has no settings."""
        return self._taken[name].config

    def fail(self, name: str, exc: BaseException) -> None:
        """Report a plugin whose service failed while running; it keeps its other services."""
        entry = self._taken[name]
        why = _explain(exc, entry.offer, "while running", self._policy.hook_s_max)
        entry.state, entry.reason, entry.remedy = why.state, why.reason, why.remedy
        self._log(entry)

    # --- the hooks -------------------------------------------------------------------------------

    def _selected(self) -> dict[str, str | None]:
        """What a node cannot do without: setting of [node] → plugin; None if it is not there."""
        found = {"auth": self._auth_name()}
        if (recorder := self._config.node.audit) != NO_RECORDER:
            there = any((o.group, o.name) == (GROUP, recorder) for o in self._offers)
            found["audit"] = recorder if there else None
        return found

    def _auth_name(self) -> str | None:
        """The name of the plugin that `[node] auth` selects; None if none is installed.

        A bundled plugin wins: a third party cannot take the place of `auth_local` by being called
        `local`.
        """
        name = self._config.node.auth
        names = (name, f"auth_{name}")
        offers = [o for o in self._offers if o.group == GROUP and o.name in names]
        offers.sort(key=lambda o: (not o.bundled, names.index(o.name)))
        return offers[0].name if offers else None

    def _no_backend(self) -> PluginError:
        name, origin = self._config.node.auth, self._config.origin("node.auth")
        return PluginError(
            f"no installed plugin is the auth backend {name!r} ({origin})",
            hint=self._install_hint(_AUTH + name.removeprefix(_AUTH)),
            code="plugin.missing",
        )

    def _no_recorder(self) -> PluginError:
        name, origin = self._config.node.audit, self._config.origin("node.audit")
        return PluginError(
            f"no installed plugin is the recorder {name!r} ({origin})",
            hint=self._install_hint(name),
            code="plugin.missing",
        )

    @property
    def auth_plugin(self) -> str:
        """The name of the plugin that `[node] auth` selects; raises PluginError."""
        if (name := self._auth_name()) is None:
            raise self._no_backend()
        return name

    @property
    def auth_backend(self) -> str:
        """The name of that plugin's backend, by the contract of AuthBackend; raises PluginError."""
        return self.auth_plugin.removeprefix("auth_")

    @property
    def auth_selected(self) -> str | None:
        """The name of the plugin that `[node] auth` selects; None if none is installed."""
        return self._auth_name()

    def auth(self, ctx_for: ContextFor) -> AuthBackend:
        """The auth backend that `[node] auth` selects, and never another one.

        Raises PluginError: not installed, not loaded, no auth backend, or its hook failed.
        """
        judge = partial(judge_auth, self.auth_backend)
        return self._make("auth", self.auth_plugin, "auth backend", judge, ctx_for)

    def recorder(
        self, ctx_for: ContextFor, sign_as: Callable[[str], Callable[[bytes], bytes]]
    ) -> Recorder | None:
        """The recorder that `[node] audit` selects, and never another one; None for "none".

        Raises PluginError: not installed, not loaded, no recorder, or its hook failed.

        Args:
            ctx_for: Makes a plugin's context.
            sign_as: Makes the signer of a recorder from its name.
        """
        if (name := self._config.node.audit) == NO_RECORDER:
            return None
        if name not in self._taken:
            raise self._no_recorder()
        judge = partial(judge_recorder, name)
        return self._make("audit", name, "recorder", judge, ctx_for, sign=sign_as(name))

    def _make(
        self,
        setting: str,
        name: str,
        what: str,
        judge: Callable[[Any], T],
        ctx_for: ContextFor,
        **given: object,
    ) -> T:
        """What a plugin makes that a setting of [node] selects."""
        entry = self._taken[name]
        hook = "ww_register_auth" if setting == "auth" else "ww_register_recorder"
        if entry.loaded and hook not in entry.hooks:
            origin = self._config.origin(f"node.{setting}")
            raise PluginError(
                f"the plugin {name!r} is no {what} ({origin})",
                hint=f"[node] {setting} takes the name of a plugin with {hook}",
                code=f"plugin.{setting}",
            )
        if entry.loaded:
            ctx = ctx_for(entry.name, entry.config)
            try:
                return self._call(entry, hook, judge, ctx=ctx, **given)
            except _Unusable as exc:
                if isinstance(exc.cause, ConfigError) and not isinstance(exc.cause, PluginError):
                    raise exc.cause from None  # a missing key, a damaged policy: it says what to do
                self._fail(entry, exc)
                self._log(entry)
        raise PluginError(
            f"the {what} {entry.name!r} is {entry.state}: {entry.reason}",
            hint=entry.remedy,
            code=f"plugin.{setting}",
        )

    def services(
        self, ctx_for: ContextFor, reserved: Iterable[str] = ("node", "session")
    ) -> tuple[Service, ...]:
        """The services of every loaded plugin. Called once, before the node listens.

        A plugin whose hook fails offers none of its services; so does one whose service has a name
        that is taken. An auth backend that is not the selected one is not asked.

        Args:
            ctx_for: Makes a plugin's context.
            reserved: Names that the core and the auth backend have taken.

        Raises PluginError for a plugin that the configuration names.
        """
        found: dict[str, Service] = {}
        taken = dict.fromkeys(reserved, PROJECT)
        for entry in self._each("ww_register_services"):
            if "ww_register_auth" in entry.hooks and entry.name != self._auth_name():
                continue
            ctx = ctx_for(entry.name, entry.config)
            try:
                made = self._call(entry, "ww_register_services", judge_services, ctx=ctx)
                _refuse_taken("service", made, taken)
            except _Unusable as exc:
                self._fail(entry, exc)
                self._log(entry)
                continue
            entry.services = tuple(made)
            taken |= dict.fromkeys(made, entry.name)
            for name, (service, proposal) in made.items():
                found[name], self.proposals[name] = service, proposal
        return tuple(found.values())

    def owner(self, service: str) -> str | None:
        """The plugin that offers a service, or None."""
        return next((e.name for e in self._entries if service in e.services), None)

    def discoveries(self, ctx_for: ContextFor) -> tuple[Discovery, ...]:
        """The discoveries of every loaded plugin; raises PluginError for one that config names."""
        found: list[Discovery] = []
        for entry in self._each("ww_register_discovery"):
            ctx = ctx_for(entry.name, entry.config)
            try:
                made = self._call(entry, "ww_register_discovery", _judge_discovery, ctx=ctx)
            except _Unusable as exc:
                self._fail(entry, exc)
                self._log(entry)
            else:
                found += [made] if made is not None else []
        return tuple(found)

    def mount_commands(self, app: typer.Typer) -> None:
        """Mount the plugins' commands on `app`, which has the core's own already.

        Each plugin gets an app of its own, and a third party's is built before it is merged: one
        that raises half way, takes a name that is there, or declares an option that typer refuses,
        mounts nothing.
        """
        import typer

        taken = {_command_name(info): "wetware" for info in _command_infos(app)}
        for entry in self._each("ww_register_commands"):
            own = typer.Typer()
            try:
                taken |= dict.fromkeys(self._mount(entry, own, taken), entry.name)
            except _Unusable as exc:
                self._fail(entry, exc)
                self._log(entry)
                continue
            app.registered_commands += own.registered_commands
            app.registered_groups += own.registered_groups

    def _mount(self, entry: _Entry, own: typer.Typer, taken: Mapping[str, str]) -> tuple[str, ...]:
        # Building costs every `ww` 10 ms; that bundled commands build is a matter of their tests.
        build = not entry.offer.bundled
        names = self._call(
            entry, "ww_register_commands", lambda _: _judge_commands(own, build=build), app=own
        )
        _refuse_taken("command", names, taken)
        return names

    def probe(self, ctx_for: ContextFor) -> None:
        """Ask the plugins for services and discoveries without a node, for the report.

        What went wrong when this process mounted their commands is taken into it.

        Nothing is run. Auth backends are not asked: theirs may create keys on the first start.
        """
        for entry in self._each("ww_register_services"):
            if "ww_register_auth" in entry.hooks:
                continue
            try:
                ctx = ctx_for(entry.name, entry.config)
                made = self._call(entry, "ww_register_services", judge_services, ctx=ctx)
                entry.services = tuple(made)
            except _Unusable as exc:
                self._fail(entry, exc)
        self.discoveries(ctx_for)
        for other in _mounted._entries if _mounted is not None else ():
            mine = self._taken.get(other.name)
            if mine is None or mine.offer != other.offer or not mine.loaded:
                continue
            if not other.loaded and other.hooks:  # it was loaded, and its commands failed
                self._fail(mine, _Unusable(other.state, other.reason, other.remedy))


def load(
    config: Config, policy: Policy = NODE, *, offers: tuple[Offer, ...] | None = None
) -> Plugins:
    """Load the plugins that the configuration selects, each on its own.

    Args:
        config: Says which ones, and holds their settings.
        policy: NODE, CLI or INSPECT.
        offers: What is installed; default `find()`.

    Raises:
        PluginError: NODE only: a plugin that the configuration names is missing or unusable.
        ConfigError: `[plugins]` is wrong; NODE only: a plugin's settings, or a section or variable
            that belongs to no installed plugin.
    """
    plugins = Plugins(config, policy, find() if offers is None else offers)
    plugins._load()
    return plugins


def _refuse_taken(what: str, names: Iterable[str], taken: Mapping[str, str]) -> None:
    for name in names:
        if name in taken:
            raise _Unusable(
                State.FAILED,
                f"its {what} {name!r} has the name of one of {taken[name]!r}",
                "keep one of the two: [plugins] disable",
            )


_mounted: Plugins | None = None
"""The plugins whose commands this process mounted, so that `probe` can say how that went."""


def mount_commands(app: typer.Typer, argv: Sequence[str] | None = None) -> None:
    """Mount the commands of the plugins that the configuration selects on `app`.

    A broken configuration raises ConfigError, unless the command line names one of the core's own
    commands: `ww config check` must run then.
    """
    global _mounted
    argv = sys.argv[1:] if argv is None else argv
    core = {_command_name(info) for info in _command_infos(app)}
    try:
        named = named_option(argv, "--config")
        _mounted = load(load_config(path=Path(named) if named else None), CLI)
        _mounted.mount_commands(app)
    except ConfigError:
        if not core.intersection(argv) and any(not arg.startswith("-") for arg in argv):
            raise


def named_option(argv: Sequence[str], option: str) -> str | None:
    """The value of an option that is needed before the command line is parsed."""
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        if arg == option and following:
            return following
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def _import(offer: Offer) -> object:
    module, _, attribute = offer.value.partition(":")
    found: object = importlib.import_module(module.strip())
    for name in filter(None, attribute.strip().split(".")):
        found = getattr(found, name)
    return found


def _no_hook(name: str) -> str:
    near = difflib.get_close_matches(name, HOOKS, 1, 0.5)
    also = f"did you mean {near[0]}?" if near else f"there are {', '.join(HOOKS)}"
    return f"unknown hook {name!r}; {also}"


# --- what a hook may return ---


def _as_is(made: Any) -> object:
    return made


def _lacks(made: object, callables: tuple[str, ...], attributes: tuple[str, ...]) -> str | None:
    for name in callables:
        if not callable(getattr(made, name, None)):
            return f"{type(made).__name__} has no method {name}()"
    for name in attributes:
        if not hasattr(made, name):
            return f"{type(made).__name__} has no attribute {name}"
    return None


def judge_auth(name: str, made: Any) -> AuthBackend:
    """What `ww_register_auth` returned, if it is the backend `name`; raises PluginError."""
    if made is None:
        raise PluginError("returned no auth backend")
    methods = (
        "run",
        "authenticate",
        "roles",
        "profile",
        "join_document",
        "admit_node",
        "findings",
        "watch",
    )
    if why := _lacks(made, methods, ("name", "schemes", "founding", "epoch", "services")):
        raise PluginError(f"returned no auth backend: {why}")
    if made.name != name:
        raise PluginError(f"returned the auth backend {str(made.name)[:80]!r}, not {name!r}")
    for attribute in ("try_out", "users"):
        if not isinstance(getattr(made, attribute, ""), str):
            kind = type(made).__name__
            raise PluginError(f"returned no auth backend: {kind}.{attribute} is no text")
    backend: AuthBackend = made
    return backend


def judge_recorder(name: str, made: Any) -> Recorder:
    """What `ww_register_recorder` returned, if it is the recorder `name`; raises PluginError."""
    methods = ("run", "admit", "report", "written", "findings")
    if why := _lacks(made, methods, ("name", "services")):
        raise PluginError(f"returned no recorder: {why}")
    if made.name != name:
        raise PluginError(f"returned the recorder {str(made.name)[:80]!r}, not {name!r}")
    recorder: Recorder = made
    return recorder


def judge_services(made: Any) -> dict[str, tuple[Service, Proposal]]:
    """What `ww_register_services` returned, by name, and what it proposes; raises PluginError."""
    from wetware.broker.proposals import proposal_of  # not in every command's start

    found: dict[str, tuple[Service, Proposal]] = {}
    for service in itertools.islice(made or (), SERVICES_PER_PLUGIN_MAX + 1):
        if not isinstance(service, hookspecs.Service):
            raise PluginError(f"returned no service: {type(service).__name__} is no Service")
        if why := _lacks(service, (), ("name", "interface")):
            raise PluginError(f"returned no service: {why}")
        name = service.name
        if not isinstance(name, str) or not _NAME.match(name):
            raise PluginError(f"{name!r:.80} is not a service's name: a-z, 0-9 and _, at most 64")
        if name in found:
            raise PluginError(f"returned two services called {name!r}")
        found[name] = service, proposal_of(service)
    if len(found) > SERVICES_PER_PLUGIN_MAX:
        raise PluginError(f"returned more than {SERVICES_PER_PLUGIN_MAX} services")
    return found


def _judge_discovery(made: Any) -> Discovery | None:
    if made is None:
        return None
    if why := _lacks(made, ("advertise", "find_peers"), ("name",)):
        raise PluginError(f"returned no discovery: {why}")
    discovery: Discovery = made
    return discovery


def _command_infos(app: typer.Typer) -> list[Any]:
    return [*app.registered_commands, *app.registered_groups]


def _command_name(info: Any) -> str:
    """The name that typer gives a command or group."""
    if isinstance(info.name, str):
        return info.name
    inner = getattr(getattr(info, "typer_instance", None), "info", None)
    if isinstance(name := getattr(inner, "name", None), str):
        return name
    callback = getattr(info, "callback", None)
    return str(getattr(callback, "__name__", "")).lower().replace("_", "-")


def _judge_commands(own: typer.Typer, *, build: bool) -> tuple[str, ...]:
    if own.registered_callback is not None:
        raise PluginError("sets a callback on the app; it may add commands and sub-apps only")
    infos = _command_infos(own)
    if len(infos) > COMMANDS_PER_PLUGIN_MAX:
        raise PluginError(f"adds more than {COMMANDS_PER_PLUGIN_MAX} commands")
    for info in infos:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", _command_name(info)):
            raise PluginError(f"{_command_name(info)!r} is not a command's name: a-z, 0-9 and -")
    if infos and build:
        from typer.main import get_group

        get_group(own)  # typer looks at the parameters only now
    return tuple(_command_name(info) for info in infos)
