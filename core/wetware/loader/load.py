"""Loads the plugins that the configuration selects, and calls their hooks, each on its own."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pluggy

from wetware import hookspecs
from wetware.base.log import get_logger
from wetware.base.version import __version__
from wetware.config import Config, NoSettings, check_schema
from wetware.errors import ConfigError, PluginError
from wetware.hookspecs import GROUP, PROJECT
from wetware.loader import guard
from wetware.loader.find import AUTH, Offer, canonical, find, is_plugin_name
from wetware.loader.judge import (
    judge_auth,
    judge_discovery,
    judge_recorder,
    judge_services,
    refuse_taken,
    register,
)
from wetware.loader.report import Plugin, State, Unusable, explain, report_to
from wetware.loader.select import BACKEND, RECORDER, Choice, Selection

if TYPE_CHECKING:
    from wetware.broker.proposals import Proposal
    from wetware.hookspecs import AuthBackend, Discovery, PluginContext, Recorder, Service

T = TypeVar("T")
ContextFor = Callable[[str, object], "PluginContext"]
"""(plugin, its configuration or None) → what its hooks are given."""

log = get_logger("plugins")

REQUIRED_S_MAX: Final = 60.0
"""For an import or a hook of a plugin without which the node does not start: there is nothing to go
on with, and what takes seconds on an idle machine, as a chain to try out, has to fit on a slow one
under load."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How plugins are loaded.

    Attributes:
        strict: What the configuration names has to be there and to load; else PluginError.
        configure: Judge what the configuration selects, and resolve `[plugins.NAME]`.
        hook_s_max: How long the import or one hook of a plugin may take.
    """

    strict: bool
    configure: bool
    hook_s_max: float


NODE: Final = Policy(strict=True, configure=True, hook_s_max=10.0)
"""For `ww node`: a plugin may compile its schema or open its store."""
CLI: Final = Policy(strict=False, configure=False, hook_s_max=5.0)
"""For mounting commands: a person waits, and a broken plugin must not break `ww`."""
INSPECT: Final = Policy(strict=False, configure=True, hook_s_max=10.0)
"""For `ww plugin list` and `ww config`: report everything, raise nothing."""


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


class Plugins:
    """The plugins of this process. Make one with `load`. Not thread-safe.

    Attributes:
        report: Every plugin that is installed or enabled, bundled ones first.
        problems: What would stop a node with this configuration, the plugins' settings aside.
    """

    def __init__(self, config: Config, policy: Policy, offers: tuple[Offer, ...]) -> None:
        self._config, self._policy, self._offers = config, policy, offers
        self._selection = Selection(config, offers)
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._by_name: dict[str, Plugin] = {}
        self._required: frozenset[str] = frozenset()
        self.report: list[Plugin] = []
        self.problems: list[ConfigError] = []

    # --- loading ---------------------------------------------------------------------------------

    def _load(self) -> None:
        selection = self._selection
        # Reading [node] costs an import that mounting commands does without.
        if self._policy.configure or selection.enable is not None:
            self._required = selection.required(self.problems)
        if self._policy.strict and self.problems:
            raise self.problems[0]
        ours = {(offer.dist, offer.name) for offer in self._offers if offer.group == GROUP}
        for offer in self._offers:
            if offer.group != GROUP and (offer.dist, offer.name) in ours:
                continue  # it speaks both
            plugin = Plugin(offer)
            self.report.append(plugin)
            try:
                self._load_one(plugin)
            except Unusable as exc:
                self._fail(plugin, exc)
        for name in selection.enable or ():
            if name not in self._by_name:
                missing = "is enabled and not installed", selection.install_hint(name)
                offer = Offer(GROUP, name, "", "", "")
                self.report.append(Plugin(offer, State.UNAVAILABLE, *missing))
        if self._policy.configure:
            self._configure()
        for plugin in self.report:
            self._log(plugin)

    def _load_one(self, plugin: Plugin) -> None:
        offer = plugin.offer
        if offer.group != GROUP:
            ours, theirs = GROUP.rpartition(".")[2], offer.group.rpartition(".")[2]
            newer = int(theirs[1:]) > int(ours[1:])
            raise Unusable(
                State.UNAVAILABLE,
                f"is written for hook API {theirs}; this wetware speaks {ours}",
                "pip install --upgrade wetware" if newer else f"pip install --upgrade {offer.dist}",
            )
        if not is_plugin_name(offer.name):
            raise Unusable(
                State.FAILED,
                f"{offer.name!r} is not a plugin's name: a-z, 0-9 and _, at most 64",
                report_to(offer),
            )
        if (other := self._by_name.get(offer.name)) is not None:
            raise Unusable(
                State.FAILED,
                f"the name {offer.name!r} is taken by {other.offer.label}, which comes first",
                report_to(offer) if offer.bundled else f"pip uninstall {offer.dist}",
            )
        self._by_name[offer.name] = plugin
        self._selection.check(offer.name, self._required)
        if self._policy.configure:  # its import takes 30 ms: not in every `ww`
            _check_fit(offer)
        module = self._guarded(plugin, "on import", lambda: _import(offer))
        plugin.hooks = self._guarded(
            plugin, "", lambda: register(self._manager, offer.name, module)
        )
        plugin.state = State.LOADED

    def _configure(self) -> None:
        def judge(made: Any) -> type:
            return NoSettings if made is None else check_schema(made)

        for plugin in self.report:
            if not plugin.loaded:
                continue
            try:
                has = "ww_register_config" in plugin.hooks
                schema = self._call(plugin, "ww_register_config", judge) if has else NoSettings
                plugin.schema = schema
                resolve = partial(self._config.plugin, plugin.name, schema)
                settings = self._guarded(plugin, "in the check of its settings", resolve)
                plugin.config = None if schema is NoSettings else settings
            except Unusable as exc:
                if plugin.schema is None or not isinstance(exc.cause, ConfigError):
                    plugin.schema = None  # nobody asks it again
                    self._fail(plugin, exc)
                    continue
                # The operator's mistake, not the plugin's: in a node it stops the start.
                if self._policy.strict:
                    raise exc.cause from None
                plugin.end(exc)
        if self._policy.strict and (problems := self._config.unknown_plugins(self.schemas)):
            raise problems[0]

    # --- calling ---------------------------------------------------------------------------------

    def _guarded(self, plugin: Plugin, what: str, call: Callable[[], T]) -> T:
        """Raises Unusable for whatever the call raises, and where it takes too long."""
        needed = self._policy.strict and plugin.name in self._required
        limit_s = REQUIRED_S_MAX if needed else self._policy.hook_s_max

        def still() -> None:
            waits = {"plugin": plugin.name, "where": what}
            log.info("plugin.still_waiting", **waits, after_s=guard.STILL_S, at_most_s=limit_s)

        known = set(sys.modules)
        try:
            return guard.bounded(call, limit_s, still)
        except KeyboardInterrupt:
            raise  # the person at the terminal
        except BaseException as exc:
            guard.forget_orphans(known)
            log.debug("plugin.raised", plugin=plugin.name, exc_info=exc)
            raise explain(exc, plugin.offer, what, limit_s) from None

    def _call(self, plugin: Plugin, hook: str, judge: Callable[[Any], T], **given: object) -> T:
        """Call one plugin's hook. `judge` runs inside the guard: a result is foreign code too."""
        impl = plugin.hooks[hook]
        args = [given[name] for name in impl.argnames]
        return self._guarded(plugin, f"in {hook}", lambda: judge(impl.function(*args)))

    def ask(
        self,
        hook: str,
        judge: Callable[[Plugin, Any], T],
        given: Callable[[Plugin], Mapping[str, object]],
    ) -> Iterator[tuple[Plugin, T]]:
        """Call a hook of each loaded plugin that has it; one that fails is reported and left out.

        Args:
            hook: Its name.
            judge: Checks what a plugin returned; raises PluginError.
            given: The arguments for a plugin.

        Raises PluginError for a plugin that the configuration names.
        """
        for plugin in self.report:
            if not plugin.loaded or hook not in plugin.hooks:
                continue
            arguments = given(plugin)
            try:
                made = self._call(plugin, hook, partial(judge, plugin), **arguments)
            except Unusable as exc:
                self._fail(plugin, exc)
                self._log(plugin)
            else:
                yield plugin, made

    def _fail(self, plugin: Plugin, exc: Unusable) -> None:
        plugin.end(exc)
        # A second plugin of a required name is a stranger.
        first = self._by_name.get(plugin.name, plugin) is plugin
        if first and plugin.name in self._required and exc.state is not State.DISABLED:
            problem = PluginError(
                f"the plugin {plugin.name!r} ({plugin.offer.label}) is {exc.state}: {exc.reason}",
                hint=exc.remedy,
                code=f"plugin.{exc.state}",
            )
            if self._policy.strict:
                raise problem
            self.problems.append(problem)

    def _log(self, plugin: Plugin) -> None:
        write = log.warning
        if not self._policy.strict or plugin.state in (State.LOADED, State.DISABLED):
            write = log.debug
        elif plugin.state is State.UNAVAILABLE and plugin.offer.bundled:
            write = log.info  # an extra that nobody asked for
        more = {"remedy": plugin.remedy} if plugin.remedy else {}
        dist, reason = plugin.offer.label, plugin.reason
        write(f"plugin.{plugin.state}", plugin=plugin.name, dist=dist, reason=reason, **more)

    # --- what came of it -------------------------------------------------------------------------

    @property
    def schemas(self) -> dict[str, type | None]:
        """Name → config class of every installed plugin; None where it is not known."""
        return {name: plugin.schema for name, plugin in self._by_name.items()}

    @property
    def auth_selected(self) -> str | None:
        """The name of the plugin that `[node] auth` selects; None if none is installed."""
        with contextlib.suppress(PluginError):
            return self._selection.chosen(BACKEND)
        return None

    @property
    def also(self) -> tuple[str, ...]:
        """The plugins that `[node] auth_also` selects; raises PluginError, ConfigError."""
        return self._selection.also()

    @property
    def auth_backend(self) -> str:
        """The name of that plugin's backend, by the contract of AuthBackend; raises PluginError."""
        return str(self._selection.chosen(BACKEND)).removeprefix(AUTH)

    def auth(self, ctx_for: ContextFor) -> AuthBackend:
        """The auth backend that `[node] auth` selects, and never another one.

        Raises PluginError: not installed, not loaded, no auth backend, or its hook failed.
        """
        return self._backend(str(self._selection.chosen(BACKEND)), ctx_for)

    def auth_also(self, ctx_for: ContextFor) -> tuple[AuthBackend, ...]:
        """The auth backends that `[node] auth_also` selects.

        Raises PluginError, as `auth` does, and ConfigError for one that would try itself out: the
        node of another authority does not keep to its machine.
        """
        made = tuple(self._backend(name, ctx_for) for name in self.also)
        for backend in made:
            if getattr(backend, "try_out", ""):
                raise ConfigError(
                    f"the auth backend {backend.name!r} would decide by what was made for a "
                    f"try-out, beside another one ({self._config.origin('node.auth_also')})",
                    hint="configure it, or try it out by itself: ww --data-dir DIR node --auth "
                    f"{backend.name} --dev",
                    code="config.try_out",
                )
        return made

    def _backend(self, plugin: str, ctx_for: ContextFor) -> AuthBackend:
        judge = partial(judge_auth, plugin.removeprefix(AUTH))
        return self._make(BACKEND, plugin, judge, ctx_for)

    def recorder(
        self, ctx_for: ContextFor, sign_as: Callable[[str], Callable[[bytes], bytes]]
    ) -> Recorder | None:
        """The recorder that `[node] audit` selects, and never another one; None for "none".

        Raises PluginError: not installed, not loaded, no recorder, or its hook failed.

        Args:
            ctx_for: Makes a plugin's context.
            sign_as: Makes the signer of a recorder from its name.
        """
        if (name := self._selection.chosen(RECORDER)) is None:
            return None
        judge = partial(judge_recorder, name)
        return self._make(RECORDER, name, judge, ctx_for, sign=sign_as(name))

    def _make(
        self,
        choice: Choice,
        name: str,
        judge: Callable[[Any], T],
        ctx_for: ContextFor,
        **given: object,
    ) -> T:
        """What a plugin makes that a setting of [node] selects."""
        plugin = self._by_name[name]
        if plugin.loaded and choice.hook not in plugin.hooks:
            origin = self._config.origin(f"node.{choice.setting}")
            raise PluginError(
                f"the plugin {plugin.name!r} is no {choice.what} ({origin})",
                hint=f"[node] {choice.setting} takes the name of a plugin with {choice.hook}",
                code=f"plugin.{choice.setting}",
            )
        if plugin.loaded:
            ctx = ctx_for(plugin.name, plugin.config)
            try:
                return self._call(plugin, choice.hook, judge, ctx=ctx, **given)
            except Unusable as exc:
                if isinstance(exc.cause, ConfigError) and not isinstance(exc.cause, PluginError):
                    raise exc.cause from None  # a missing key, a damaged policy: it says what to do
                self._fail(plugin, exc)
                self._log(plugin)
        raise PluginError(
            f"the {choice.what} {plugin.name!r} is {plugin.state}: {plugin.reason}",
            hint=plugin.remedy,
            code=f"plugin.{choice.setting}",
        )

    def services(
        self, ctx_for: ContextFor, reserved: Iterable[str] = ()
    ) -> dict[str, tuple[Service, Proposal]]:
        """The services of every loaded plugin, by name, and what each proposes. Called once.

        A plugin whose hook fails offers none of its services; so does one whose service has a name
        that is taken. Of auth backends the selected ones are asked, and in a node only: what they
        make may last.

        Args:
            ctx_for: Makes a plugin's context.
            reserved: Names that the core and the auth backend have taken.

        Raises PluginError for a plugin that the configuration names.
        """
        found: dict[str, tuple[Service, Proposal]] = {}
        taken = dict.fromkeys(reserved, PROJECT)
        strict = self._policy.strict
        backends = {self.auth_selected, *self.also} if strict else set()
        for plugin in self.report:
            if BACKEND.hook in plugin.hooks and plugin.name not in backends:
                plugin.hooks.pop("ww_register_services", None)

        def judge(_: Plugin, made: Any) -> dict[str, tuple[Service, Proposal]]:
            services = judge_services(made)
            refuse_taken("service", services, taken)
            return services

        for plugin, services in self.ask("ww_register_services", judge, _context(ctx_for)):
            plugin.services = tuple(services)
            taken |= dict.fromkeys(services, plugin.name)
            found |= services
        return found

    def discoveries(self, ctx_for: ContextFor) -> tuple[Discovery, ...]:
        """The discoveries of every loaded plugin; raises PluginError for one that config names."""
        asked = self.ask(
            "ww_register_discovery", lambda _, made: judge_discovery(made), _context(ctx_for)
        )
        return tuple(made for _, made in asked if made is not None)

    def take_failures(self, other: Plugins) -> None:
        """Report the plugins that failed where the same ones were asked for something else."""
        failed = {plugin.offer: plugin for plugin in other.report if plugin.hooks}
        for plugin in self.report:
            theirs = failed.get(plugin.offer)
            if plugin.loaded and theirs is not None and not theirs.loaded:
                self._fail(plugin, Unusable(theirs.state, theirs.reason, theirs.remedy))

    def service_failed(self, service: str, exc: BaseException) -> None:
        """Report the plugin whose service failed while running; it keeps its other services."""
        for plugin in self.report:
            if service in plugin.services:
                plugin.end(explain(exc, plugin.offer, "while running", self._policy.hook_s_max))
                self._log(plugin)


def _context(ctx_for: ContextFor) -> Callable[[Plugin], Mapping[str, object]]:
    return lambda plugin: {"ctx": ctx_for(plugin.name, plugin.config)}


def _import(offer: Offer) -> object:
    module, _, attribute = offer.value.partition(":")
    found: object = importlib.import_module(module.strip())
    for name in filter(None, attribute.strip().split(".")):
        found = getattr(found, name)
    return found


def _check_fit(offer: Offer) -> None:
    """Raise Unusable where a distribution requires another wetware than this one.

    pip sees to it when it installs; `--no-deps`, and an upgrade of wetware alone, go past it.
    """
    for needs in () if offer.bundled else offer.requirements():
        applies = needs.marker is None or needs.marker.evaluate({"extra": ""})
        if canonical(needs.name) != PROJECT or not applies:
            continue
        if not needs.specifier.contains(__version__, prereleases=True):
            raise Unusable(
                State.UNAVAILABLE,
                f"needs wetware {needs.specifier}; this is {__version__}",
                f"pip install --upgrade wetware {offer.dist}",
            )
