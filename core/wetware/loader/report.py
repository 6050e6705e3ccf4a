"""What is said of a plugin that cannot be used, and what mends it."""

from __future__ import annotations

import enum
import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pluggy

from wetware.base.finding import Finding, ok, remedy_of, warning
from wetware.errors import WetwareError
from wetware.hookspecs import PROJECT
from wetware.loader import guard
from wetware.loader.find import AUTH, Offer, canonical

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

REASON_CHARS_MAX: Final = 400


class State(enum.StrEnum):
    """What became of a plugin."""

    LOADED = "loaded"
    DISABLED = "disabled"
    """The configuration does not want it; nothing of it was imported."""
    UNAVAILABLE = "unavailable"
    """Something that it needs is not installed; the remedy says what to install."""
    FAILED = "failed"
    """It is broken, or was refused."""


class Unusable(Exception):
    """A plugin cannot be used.

    Args:
        state: What became of it.
        reason: Why; foreign text as well.
        remedy: What mends it; "" where nothing is known.
        cause: What it raised.
    """

    def __init__(
        self, state: State, reason: str, remedy: str = "", cause: BaseException | None = None
    ) -> None:
        super().__init__(reason)
        self.state, self.cause = state, cause
        self.reason, self.remedy = _one_line(reason), _one_line(remedy)


@dataclass(slots=True, eq=False)
class Plugin:
    """One that is installed or enabled: a line of `ww plugin list`.

    Attributes:
        offer: Where it comes from.
        state: What became of it.
        reason: Why it is not loaded; "" for a loaded one.
        remedy: What mends it; "" where nothing is known.
        hooks: Those that it has, if it was imported.
        services: What it offers, once it was asked.
        schema: The class of its settings; None where that is not known.
        config: Its settings, or None if it has none.
    """

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

    def end(self, why: Unusable) -> None:
        """It is not used any more."""
        self.state, self.reason, self.remedy = why.state, why.reason, why.remedy


def _one_line(text: str) -> str:
    """Foreign text, fit for a report: one line, printable, bounded."""
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= REASON_CHARS_MAX else line[: REASON_CHARS_MAX - 1] + "…"


def explain(exc: BaseException, offer: Offer, what: str, limit_s: float) -> Unusable:
    """What to report for what a plugin raised; `what` says where, e.g. "on import"."""
    state, remedy = State.FAILED, report_to(offer)
    match exc:
        case guard.Hung():
            reason = f"hung {what}: not done after {limit_s:g} s"
        case pluggy.PluginValidationError():
            reason = str(exc).splitlines()[-1]
        case ImportError(name=str(name)) if name:
            state, reason, remedy = _of_import(exc, offer, name.partition(".")[0])
        case SystemExit():
            reason = f"called sys.exit {what}"
        case WetwareError():
            reason = f"{what}: {exc.message}" if what else exc.message
            remedy = exc.hint or remedy
        case _:
            from wetware.base.disk import remedy as remedy_of_disk  # not in every command's start

            try:
                text = str(exc)
            except Exception:  # foreign code, once more
                text = "(an exception that cannot be printed)"
            place = _place(exc.__traceback__)
            reason = _one_line(": ".join(filter(None, (what, type(exc).__name__, text))))
            reason = reason[: REASON_CHARS_MAX - len(place)] + place
            remedy = remedy_of_disk(exc) or remedy
    return Unusable(state, reason, remedy, exc)


def _of_import(exc: ImportError, offer: Offer, top: str) -> tuple[State, str, str]:
    """State, reason and remedy, where the package `top` could not be imported, or lacks a name."""
    if top == PROJECT:
        reason = f"does not fit this version of wetware: {exc}"
        return State.FAILED, reason, f"pip install --upgrade wetware {offer.dist}"
    if top == offer.package:
        reason = f"{exc}: the installation of {offer.label} is incomplete"
        return State.FAILED, reason, f"pip install --force-reinstall {offer.dist}"
    if isinstance(exc, ModuleNotFoundError):
        reason = f"needs {exc.name!r}, which is not installed"
        return State.UNAVAILABLE, reason, _pip_hint(offer, top, "pip install")
    reason = f"cannot use the installed {top!r}: {exc}"
    return State.UNAVAILABLE, reason, _pip_hint(offer, top, "pip install --upgrade")


def _place(traceback: TracebackType | None) -> str:
    """The last line of the plugin's that ran, e.g. " (plugin.py:12)"."""
    place = ""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        ours = file.startswith(("<frozen", os.path.dirname(__file__))) or file == importlib.__file__
        if not ours:
            place = f" ({os.path.basename(file)}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def report_to(offer: Offer) -> str:
    """Whom to tell that a plugin is broken."""
    if offer.bundled:
        return "this is a defect of wetware; please report it"
    return f"tell the authors of {offer.dist}; until then: pip uninstall {offer.dist}"


def _pip_hint(offer: Offer, module: str, pip: str) -> str:
    """The command that brings a missing module, from the distribution's own metadata.

    Never `pip install MODULE` from a guess: the name may be somebody else's distribution.
    """
    own = {canonical(offer.name), canonical(offer.name.removeprefix(AUTH))}
    extras: list[str] = []
    for needs in offer.requirements():
        if canonical(needs.name) != canonical(module):
            continue
        if needs.marker is None or needs.marker.evaluate({"extra": ""}):
            return f"{pip} {needs.name}"
        extras += (extra for extra in offer.extras if needs.marker.evaluate({"extra": extra}))
    extras = extras or [extra for extra in offer.extras if canonical(extra) in own]
    if not extras:
        return f"{offer.dist} does not say what provides {module!r}; ask its authors"
    best = min(extras, key=lambda extra: (canonical(extra) not in own, extra in ("all", "dev")))
    return f"{pip} '{offer.dist}[{best}]'"


def findings(plugins: Iterable[Plugin]) -> list[Finding]:
    """One finding for the plugins that are well, one for each that is not."""
    found, loaded = [], []
    for plugin in plugins:
        if plugin.state in (State.FAILED, State.UNAVAILABLE):
            remedy = remedy_of(plugin.remedy, "ww plugin list")
            text = f"{plugin.name} is {plugin.state}: {plugin.reason}"
            found.append(warning("plugins", text, remedy))
        elif plugin.state == State.LOADED:
            loaded.append(plugin.name)
    if loaded:
        found.append(ok("plugins", f"loaded: {', '.join(loaded)}"))
    return found
