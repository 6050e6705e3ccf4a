"""What the configuration says of plugins: which are wanted, and what is wrong with that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Final, NamedTuple

from wetware.errors import ConfigError, PluginError
from wetware.hookspecs import GROUP
from wetware.loader.find import AUTH
from wetware.loader.report import State, Unusable

if TYPE_CHECKING:
    from wetware.config import Config
    from wetware.loader.find import Offer

NO_RECORDER: Final = "none"
"""In `[node] audit`: decisions are not recorded."""


class Choice(NamedTuple):
    """A setting of [node] that names a plugin without which a node does not start.

    Attributes:
        setting: Its name.
        what: What the plugin is.
        hook: By which hook.
        prefix: What people leave out of the plugin's name.
    """

    setting: str
    what: str
    hook: str
    prefix: str


BACKEND: Final = Choice("auth", "auth backend", "ww_register_auth", AUTH)
RECORDER: Final = Choice("audit", "recorder", "ww_register_recorder", "")


class Selection:
    """The plugins of one configuration, of those that are installed."""

    def __init__(self, config: Config, offers: Sequence[Offer]) -> None:
        self._config, self._offers = config, offers
        self.enable, self.disable = config.plugins.enable, config.plugins.disable

    def chosen(self, choice: Choice) -> str | None:
        """The plugin that a setting of [node] selects; None for no recorder.

        Raises PluginError if none is installed.
        """
        name: str = getattr(self._config.node, choice.setting)
        if choice is RECORDER and name == NO_RECORDER:
            return None
        return self._installed(choice, name)

    def also(self) -> tuple[str, ...]:
        """The plugins of `[node] auth_also`; raises PluginError, and ConfigError for one twice."""
        node = self._config.node
        names = [self._installed(BACKEND, name, "auth_also") for name in node.auth_also]
        if len({self.chosen(BACKEND), *names}) <= len(names):
            raise ConfigError(
                f"an auth backend is selected twice: {node.auth}, {', '.join(node.auth_also)} "
                f"({self._config.origin('node.auth_also')})",
                hint="[node] auth is one of them already: leave it out of auth_also",
                code="config.value",
            )
        return tuple(names)

    def _installed(self, choice: Choice, name: str, setting: str = "") -> str:
        """The plugin of that name; raises PluginError if none is installed.

        A bundled one wins: a third party cannot take the place of `auth_local` by being called
        `local`.
        """
        names = (name, choice.prefix + name)
        offers = [o for o in self._offers if o.group == GROUP and o.name in names]
        if offers:
            return min(offers, key=lambda o: (not o.bundled, names.index(o.name))).name
        origin = self._config.origin(f"node.{setting or choice.setting}")
        raise PluginError(
            f"no installed plugin is the {choice.what} {name!r} ({origin})",
            hint=self.install_hint(choice.prefix + name.removeprefix(choice.prefix)),
            code="plugin.missing",
        )

    def required(self, problems: list[ConfigError]) -> frozenset[str]:
        """The plugins without which no node starts; what is wrong is added to `problems`."""
        required = set(self.enable or ())
        settings: dict[str, Callable[[], tuple[str | None, ...]]] = {
            "auth": lambda: (self.chosen(BACKEND),),
            "auth_also": self.also,
            "audit": lambda: (self.chosen(RECORDER),),
        }
        for setting, chosen in settings.items():
            try:
                names = {name for name in chosen() if name is not None}
            except ConfigError as exc:
                if not problems or problems[-1].message != exc.message:  # `also` looks at both
                    problems.append(exc)
                continue
            required |= names
            problems += (
                ConfigError(
                    f"[node] {setting} selects {name!r}, and {self._list('disable')} forbids it",
                    hint=f"select another one with [node] {setting}, or take it out of `disable`",
                    code="config.value",
                )
                for name in sorted(names.intersection(self.disable))
            )
        installed = {offer.name for offer in self._offers}
        for name in self.disable:
            near = difflib.get_close_matches(name, installed, 1, 0.6)
            if name not in installed and near:
                # What was meant would stay enabled: a misspelt denial must not become a permission.
                problems.append(
                    ConfigError(
                        f"{self._list('disable')}: no plugin {name!r}; did you mean {near[0]}?",
                        hint="`ww plugin list` shows the installed ones",
                        code="config.unknown",
                    )
                )
        problems += (
            PluginError(
                f"{self._list('enable')}: the plugin {name!r} is not installed",
                hint=self.install_hint(name),
                code="plugin.missing",
            )
            for name in self.enable or ()
            if name not in installed
        )
        return frozenset(required)

    def check(self, name: str, required: Set[str]) -> None:
        """Raise Unusable for a plugin that the configuration does not want."""
        if name in self.disable:
            raise Unusable(State.DISABLED, f"by {self._list('disable')}")
        if self.enable is not None and name not in required:
            reason = f"not in {self._list('enable')}"
            raise Unusable(State.DISABLED, reason, f"add {name!r} to it")

    def install_hint(self, name: str) -> str:
        """What brings a plugin that is not installed."""
        installed = sorted({offer.name for offer in self._offers if offer.group == GROUP})
        if name.startswith(AUTH):
            installed = [each for each in installed if each.startswith(AUTH)]
        # Without the prefix, which would make any two backends look alike.
        plain = {each.removeprefix(AUTH): each for each in installed}
        if near := difflib.get_close_matches(name.removeprefix(AUTH), plain, 1, 0.6):
            return f"did you mean {plain[near[0]]}?"
        for offer in self._offers:
            for extra in offer.extras:
                if offer.bundled and extra in (name, name.removeprefix(AUTH)):
                    return f"pip install '{offer.dist}[{extra}]'"
        return (
            f"pip install the distribution that offers the plugin {name!r}; installed are "
            f"{', '.join(installed)}"
        )

    def _list(self, name: str) -> str:
        return f"[plugins] {name} ({self._config.origin(f'plugins.{name}')})"
