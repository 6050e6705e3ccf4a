"""The loader: what is found, selected, isolated and reported, plugin by plugin."""

from __future__ import annotations

import importlib
import re
import signal
import sys
import threading
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import typer
from tests.packaging.third_party import BROKEN, GOOD, install, install_broken

from wetware import config, hookspecs, loader, testing
from wetware.cli import mount
from wetware.client.installed import CLIENT_GROUP, SIGNER_GROUP
from wetware.errors import EXIT_CONFIG, ConfigError, KeyFileError, PluginError, SchemaError
from wetware.hookspecs import GROUP, hookimpl
from wetware.loader import Offer, Plugin, Plugins, Policy, State, guard
from wetware.loader.judge import HOOKS
from wetware.loader.load import REQUIRED_S_MAX
from wetware.loader.report import REASON_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from wetware.config import Config

ROOT = Path(__file__).parents[3]
NODE = Policy(strict=True, configure=True, hook_s_max=5.0)
CHECK = Policy(strict=False, configure=True, hook_s_max=5.0)
SHORT = Policy(strict=False, configure=True, hook_s_max=0.3)

AUTH_METHODS = (
    "run",
    "authenticate",
    "roles",
    "profile",
    "join_document",
    "admit_node",
    "findings",
    "watch",
)


class Backend:
    schemes, founding, epoch, services = ("s",), b"f", 1, ()

    def __init__(self, name: str = "local") -> None:
        self.name = name

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in AUTH_METHODS:
            return lambda *_: None
        raise AttributeError(name)


class Recorder:
    services = ()

    def __init__(self, name: str = "audit", **given: Any) -> None:
        self.name, self.given = name, given

    async def run(self, *, task_status: Any) -> None: ...

    async def admit(self, record: Any) -> None: ...

    def report(self, record: Any, *, ending: bool) -> None: ...

    async def written(self) -> None: ...

    def findings(self) -> tuple[()]:
        return ()


def sign_as(name: str) -> Callable[[bytes], bytes]:
    return lambda data: name.encode() + data


class Service(hookspecs.Service):
    interface: Any = None

    def __init__(self, name: str) -> None:
        self.name = name

    def bootstrap(self, principal: object) -> Any: ...


def service(name: str) -> Service:
    return Service(name)


def context(name: str, settings: object) -> Any:
    return SimpleNamespace(name=name, config=settings)


class World:
    """Plugins that are modules made here, as if installed."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self._monkeypatch = home, monkeypatch
        self.offers: list[Offer] = []

    def plugin(
        self,
        name: str,
        *,
        dist: str = "",
        group: str = GROUP,
        requires: tuple[str, ...] = (),
        extras: tuple[str, ...] = (),
        **hooks: object,
    ) -> None:
        """An installed plugin; `wetware` as dist makes it a bundled one."""
        dist = dist or f"ww-{name}"
        module = types.ModuleType(f"{dist.replace('-', '_')}_{name}_{len(self.offers)}")
        for hook, function in hooks.items():
            setattr(module, hook, hookimpl(function))
        self._monkeypatch.setitem(sys.modules, module.__name__, module)
        self.offers.append(Offer(group, name, module.__name__, dist, "1.0", extras, requires))

    def config(
        self, text: str = "", env: Mapping[str, str] | None = None, **node: object
    ) -> Config:
        (self.home / "ww.toml").write_text(text)
        flags = {f"node.{key}": value for key, value in node.items()}
        return config.load(flags, env={"WW_HOME": str(self.home), **(env or {})})

    def load(self, text: str = "", policy: Policy = CHECK, **node: object) -> Plugins:
        offers = sorted(self.offers, key=lambda o: (not o.bundled, o.dist, o.name))
        return loader.load(self.config(text, **node), policy, offers=tuple(offers))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """With the bundled backend `auth_local`, and the bundled recorder."""
    made = World(tmp_path, monkeypatch)
    made.plugin("audit", dist="wetware", ww_register_recorder=lambda ctx, sign: Recorder())
    made.plugin("auth_local", dist="wetware", ww_register_auth=lambda ctx: Backend())
    return made


def status(loaded: Plugins, name: str, dist: str = "") -> Plugin:
    (found,) = [s for s in loaded.report if s.name == name and dist in s.offer.dist]
    return found


# --- find ---


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of distributions on sys.path; what they import is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("ww_"):
            del sys.modules[name]


def test_find_reads_dist_info_and_puts_bundled_ones_first(site: Path) -> None:
    install(site, "zeta", "", requires=("a>=1",), extras=("x", "y"))
    install(site, "alpha", "")
    found = loader.find()
    assert [o.name for o in found if not o.bundled] == ["alpha", "zeta"]
    bundled = [o.bundled for o in found]
    assert bundled == sorted(bundled, reverse=True)
    assert bundled[0]
    assert found[-1] == Offer(
        "wetware.v1", "zeta", "ww_zeta.plugin", "ww-zeta", "1.2", ("x", "y"), ("a>=1",)
    )


def test_find_sees_what_importlib_metadata_sees() -> None:
    from importlib import metadata

    points = metadata.entry_points(group=GROUP)
    ours = {(o.name, o.value, o.dist, o.version) for o in loader.find() if o.group == GROUP}
    assert ours == {(p.name, p.value, p.dist.name, p.dist.version) for p in points if p.dist}


def test_find_survives_what_lies_about_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.dist-info").mkdir()
    (tmp_path / "b.dist-info").write_text("a file")
    (tmp_path / "c.dist-info").mkdir()
    (tmp_path / "c.dist-info" / "entry_points.txt").write_bytes(b"[wetware.v1]\n\xff\xfe\nx\n= y\n")
    (tmp_path / "d.dist-info").mkdir()
    (tmp_path / "d.dist-info" / "entry_points.txt").mkdir()
    (tmp_path / "e.zip").write_bytes(b"")
    found = loader.find([str(tmp_path), str(tmp_path / "none"), str(tmp_path / "e.zip")])
    assert found == ()


def test_of_two_distributions_of_one_name_the_first_on_the_path_counts(tmp_path: Path) -> None:
    for folder, version in (("one", "1"), ("two", "2")):
        install(tmp_path / folder, "x", "", version=version)
    (found,) = loader.find([str(tmp_path / "one"), str(tmp_path / "two")])
    assert found.version == "1"


# --- every way to be broken ---


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_harms_nobody(name: str, site: Path, world: World) -> None:
    world.plugin("pubsub", dist="wetware", ww_register_services=lambda ctx: [service("pubsub")])
    install_broken(site, name)
    install(site, "zz_good", GOOD)
    third = tuple(o for o in loader.find([str(site)]) if not o.bundled)
    hangs = name in ("hangs", "spins", "hangs_in_register")
    policy = SHORT if hangs else CHECK
    loaded = loader.load(world.config(), policy, offers=(*world.offers, *third))
    app = typer.Typer()
    app.command("node")(lambda: None)
    mount.mount(loaded, app)
    services = loaded.services(context)

    broken = BROKEN[name]
    found = status(loaded, broken.plugin or name, f"ww-{name.replace('_', '-')}")
    assert (found.state, found.offer.dist) == (broken.state, f"ww-{name.replace('_', '-')}")
    assert broken.reason in found.reason, found
    assert broken.remedy in found.remedy, found
    assert found.reason.isprintable()
    assert list(services) == ["pubsub"]
    for good in ("pubsub", "zz_good", "auth_local"):
        assert status(loaded, good, "" if good != "pubsub" else "wetware").state == "loaded"
    assert [mount.command_name(c) for c in app.registered_commands] == ["node", "greet"]
    assert loaded.auth(context).name == "local"


def test_what_a_plugin_prints_goes_to_stderr(
    site: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "talks", GOOD)
    loader.load(world.config(), CHECK, offers=(*world.offers, *loader.find([str(site)])))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "talks on import" in captured.err


def test_a_missing_module_without_metadata_gives_no_guess(world: World) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'acme'", name="acme")

    world.plugin("a", ww_register_config=missing)
    world.plugin("b", ww_register_config=missing, requires=("Acme>=1",))
    world.plugin("c", ww_register_config=missing, extras=("c",))
    world.plugin(
        "d",
        ww_register_config=missing,
        requires=("acme; extra == 'all'", 'acme; extra=="d"'),
        extras=("all", "d"),
    )
    loaded = world.load()
    assert {s.state for s in loaded.report if s.name in "abcd"} == {State.UNAVAILABLE}
    assert "ask its authors" in status(loaded, "a").remedy
    assert status(loaded, "b").remedy == "pip install Acme"
    assert status(loaded, "c").remedy == "pip install 'ww-c[c]'"
    assert status(loaded, "d").remedy == "pip install 'ww-d[d]'"


def test_hostile_text_of_an_exception_is_one_bounded_line(world: World) -> None:
    class Nasty(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def long() -> None:
        raise ValueError("\x1b[31mred\nnext line" + "x" * 10_000)

    def nasty() -> None:
        raise Nasty

    world.plugin("long", ww_register_config=long)
    world.plugin("nasty", ww_register_config=nasty)
    loaded = world.load()
    assert status(loaded, "long").reason.isprintable()
    assert len(status(loaded, "long").reason) < REASON_CHARS_MAX + 100
    assert "cannot be printed" in status(loaded, "nasty").reason


def test_interrupting_ww_is_not_a_plugins_failure(world: World) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    world.plugin("a", ww_register_config=interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.load()


# --- the hang guard ---


def test_the_guard_restores_handler_and_timer() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: calls.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with pytest.raises(guard.Hung):
            guard.bounded(lambda: time.sleep(60), 0.05)
        assert guard.bounded(lambda: 7, 1.0) == 7
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left_s < 100
        signal.raise_signal(signal.SIGALRM)
        assert calls == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_the_guard_interrupts_again_what_swallows_the_first_time() -> None:
    swallowed = []

    def stubborn() -> None:
        try:
            time.sleep(60)
        except BaseException as exc:
            swallowed.append(type(exc).__name__)
        time.sleep(60)

    with pytest.raises(guard.Hung):
        guard.bounded(stubborn, 0.05)
    assert swallowed == ["Hung"]


def test_outside_the_main_thread_the_call_still_runs() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(guard.bounded(lambda: 7, 1.0)))
    thread.start()
    thread.join(10)
    assert results == [7]


def test_a_slow_plugin_that_the_node_needs_is_waited_for_and_the_log_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(ctx: object) -> Backend:
        """Not done before the log has said so, and so after any limit of the others."""
        while not caplog.records:
            time.sleep(0.001)
        return Backend("slow")

    world.plugin("auth_slow", ww_register_auth=slow)
    loaded = world.load("", NODE, auth="slow")
    caplog.set_level("INFO")
    monkeypatch.setattr(guard, "STILL_S", NODE.hook_s_max / 100)
    monkeypatch.setattr(loaded, "_policy", replace(NODE, hook_s_max=NODE.hook_s_max / 200))
    assert loaded.auth(context).name == "slow"
    (said,) = [record.ww for record in caplog.records]  # type: ignore[attr-defined]
    assert said == {
        "plugin": "auth_slow",
        "where": "in ww_register_auth",
        "after_s": guard.STILL_S,
        "at_most_s": REQUIRED_S_MAX,
    }


def package(site: Path, name: str, middle: str) -> None:
    """A package as `asyncio` is: it uses the name that importing its submodule gives it."""
    folder = site / name
    folder.mkdir()
    (folder / "base.py").write_text("VALUE = 7\n")
    text = f"from .base import *\n{middle}\nVALUE = base.VALUE\n"
    (folder / "__init__.py").write_text(text)


def test_a_module_of_the_standard_library_is_never_left_half_imported(
    site: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by a plugin that is given up in the middle of importing it."""
    monkeypatch.setattr(sys, "stdlib_module_names", sys.stdlib_module_names | {"ww_shared"})
    over = SHORT.hook_s_max + 2 * guard._AGAIN_S  # the limit passes, and it is tried again
    wait = f"import time; end = time.monotonic() + {over}\nwhile time.monotonic() < end: pass"
    package(site, "ww_shared", wait)
    install(site, "slow", "import time, ww_shared; time.sleep(3600)")
    offers = (*world.offers, *loader.find([str(site)]))
    loaded = loader.load(world.config(), SHORT, offers=offers)
    assert status(loaded, "slow").reason == "hung on import: not done after 0.3 s"
    assert sys.modules["ww_shared"].VALUE == 7


def test_what_a_failed_import_leaves_behind_is_forgotten(site: Path, world: World) -> None:
    """The second import of it in a process says the same as the first, and not a NameError."""
    package(site, "ww_dep", "import ww_acme_driver")
    install(site, "needs", "import ww_dep")
    offers = (*world.offers, *loader.find([str(site)]))
    for _ in range(2):
        loaded = loader.load(world.config(), CHECK, offers=offers)
        assert "needs 'ww_acme_driver'" in status(loaded, "needs").reason
    (site / "ww_acme_driver.py").write_text("")
    importlib.invalidate_caches()
    loaded = loader.load(world.config(), CHECK, offers=offers)
    assert status(loaded, "needs").state is State.LOADED


# --- selection ---


def test_without_enable_every_installed_plugin_is_loaded(world: World) -> None:
    world.plugin("a")
    world.plugin("b")
    assert {s.name: str(s.state) for s in world.load(policy=NODE).report} == {
        "audit": "loaded",
        "auth_local": "loaded",
        "a": "loaded",
        "b": "loaded",
    }


def test_enable_loads_those_and_the_auth_backend(world: World) -> None:
    world.plugin("a")
    world.plugin("b")
    loaded = world.load('[plugins]\nenable = ["b"]', NODE)
    assert {s.name: str(s.state) for s in loaded.report} == {
        "audit": "loaded",
        "auth_local": "loaded",
        "a": "disabled",
        "b": "loaded",
    }
    assert "not in [plugins] enable" in status(loaded, "a").reason
    assert "ww.toml line 2" in status(loaded, "a").reason


def test_disable_wins(world: World) -> None:
    world.plugin("a")
    loaded = world.load('[plugins]\nenable = ["a"]\ndisable = ["a"]', NODE)
    assert status(loaded, "a").state is State.DISABLED
    assert "ww.toml line 3" in status(loaded, "a").reason


def test_a_disabled_or_not_enabled_plugin_is_not_imported(site: Path, world: World) -> None:
    install_broken(site, "raises", "hangs")
    offers = (*world.offers, *loader.find([str(site)]))
    for text in ('disable = ["raises", "hangs"]', "enable = []"):
        loaded = loader.load(world.config(f"[plugins]\n{text}"), NODE, offers=offers)
        assert [str(s.state) for s in loaded.report] == ["loaded"] * 2 + ["disabled"] * 2


def test_an_enabled_plugin_that_fails_stops_a_node(site: Path, world: World) -> None:
    install_broken(site, "raises", "needs")
    offers = (*world.offers, *loader.find([str(site)]))
    for name, remedy in (("raises", "pip uninstall ww-raises"), ("needs", "'ww-needs[db]'")):
        with pytest.raises(PluginError) as caught:
            loader.load(world.config(f'[plugins]\nenable = ["{name}"]'), NODE, offers=offers)
        assert caught.value.exit_code == EXIT_CONFIG
        assert f"'{name}'" in caught.value.message
        assert BROKEN[name].reason in caught.value.message
        assert remedy in caught.value.hint
    loaded = loader.load(world.config('[plugins]\nenable = ["raises"]'), CHECK, offers=offers)
    assert [p.code for p in loaded.problems] == ["plugin.failed"]


def test_an_enabled_plugin_whose_hook_fails_later_stops_a_node(world: World) -> None:
    def bad(ctx: object) -> None:
        raise SchemaError("pubsub.capnp:3: no such type 'Nowhere'", hint="mend the schema")

    world.plugin("a", ww_register_services=bad)
    loaded = world.load('[plugins]\nenable = ["a"]', NODE)
    with pytest.raises(PluginError, match=r"Nowhere") as caught:
        loaded.services(context)
    assert caught.value.hint == "mend the schema"


def test_an_enabled_plugin_that_is_not_installed(world: World) -> None:
    world.plugin("pubsub", dist="wetware", extras=("evm",))
    with pytest.raises(PluginError, match="'pubsbu' is not installed") as caught:
        world.load('[plugins]\nenable = ["pubsbu"]', NODE)
    assert "did you mean pubsub?" in caught.value.hint
    with pytest.raises(PluginError, match="'auth_evm' is not installed") as caught:
        world.load('[plugins]\nenable = ["auth_evm"]', NODE)
    loaded = world.load('[plugins]\nenable = ["pubsbu"]')
    assert status(loaded, "pubsbu").state is State.UNAVAILABLE


def test_a_misspelt_disable_is_an_error_and_not_a_permission(world: World) -> None:
    world.plugin("pubsub")
    with pytest.raises(ConfigError, match="did you mean pubsub"):
        world.load('[plugins]\ndisable = ["pubsbu"]', NODE)
    assert world.load('[plugins]\ndisable = ["unrelated"]', NODE).problems == []


# --- clashes ---


def test_a_third_party_cannot_displace_a_bundled_plugin(world: World) -> None:
    world.plugin("pubsub", dist="aaa")
    world.plugin("pubsub", dist="wetware")
    loaded = world.load(policy=NODE)
    assert status(loaded, "pubsub", "wetware").state is State.LOADED
    found = status(loaded, "pubsub", "aaa")
    assert found.state is State.FAILED
    assert "is taken by wetware 1.0" in found.reason
    for text in ('[plugins]\ndisable = ["pubsub"]', "[plugins]\nenable = []"):
        states = [str(s.state) for s in world.load(text).report if s.name == "pubsub"]
        assert states == ["disabled", "failed"], "not even where the bundled one is not loaded"


def test_a_stranger_with_a_required_name_does_not_stop_the_node(world: World) -> None:
    world.plugin("auth_local", dist="aaa")
    loaded = world.load('[plugins]\nenable = ["auth_local"]', NODE)
    assert status(loaded, "auth_local", "aaa").state is State.FAILED


def test_a_service_name_is_given_once(world: World) -> None:
    world.plugin("a", ww_register_services=lambda ctx: [service("x")])
    world.plugin("b", ww_register_services=lambda ctx: [service("y"), service("x")])
    world.plugin("c", ww_register_services=lambda ctx: [service("node")])
    world.plugin("d", ww_register_services=lambda ctx: [service("z")])
    loaded = world.load()
    assert list(loaded.services(context, ("node",))) == ["x", "z"]
    assert "has the name of one of 'a'" in status(loaded, "b").reason
    assert "has the name of one of 'wetware'" in status(loaded, "c").reason
    assert (status(loaded, "a").services, status(loaded, "b").services) == (("x",), ())
    assert status(loaded, "d").services == ("z",)


def test_bad_names_are_refused(world: World) -> None:
    for name in ("Enable", "enable", "../x", "a" * 65, "a-b"):
        world.plugin(name, dist=f"d{len(world.offers)}")
    assert [str(s.state) for s in world.load().report] == ["loaded"] * 2 + ["failed"] * 5


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (3, "not iterable"),
        ([3], "int is no Service"),
        ([service("No Name")], "is not a service's name"),
        ([service("x"), service("x")], "two services called 'x'"),
        ([service(f"x{i}") for i in range(33)], "more than 32 services"),
    ],
)
def test_what_ww_register_services_returns_is_judged(world: World, made: object, why: str) -> None:
    world.plugin("a", ww_register_services=lambda ctx: made)
    loaded = world.load()
    assert loaded.services(context) == {}
    assert why in status(loaded, "a").reason


def test_an_endless_generator_of_services_ends(world: World) -> None:
    def endless(ctx: object) -> Iterator[object]:
        count = 0
        while True:
            count += 1
            yield service(f"x{count}")

    world.plugin("a", ww_register_services=endless)
    assert world.load().services(context) == {}


# --- auth ---


def test_only_the_selected_backend_is_asked(world: World) -> None:
    asked: list[str] = []

    def backend(name: str) -> Callable[[Any], object]:
        def make(ctx: Any) -> object:
            asked.append(f"{name} {ctx.name}")
            return Backend(name)

        return make

    world.plugin(
        "auth_other",
        ww_register_auth=backend("other"),
        ww_register_services=lambda ctx: [service("other_admin")],
    )
    loaded = world.load(policy=NODE)
    loaded.auth(context)
    assert loaded.services(context) == {}
    assert asked == []
    loaded = world.load(policy=NODE, auth="other")
    loaded.auth(context)
    assert asked == ["other auth_other"]
    assert list(loaded.services(context)) == ["other_admin"]
    assert loaded.auth_selected == "auth_other"


def test_a_third_party_called_local_is_not_the_backend_local(world: World) -> None:
    world.plugin("local", ww_register_auth=lambda ctx: pytest.fail("asked"))
    assert world.load(policy=NODE).auth(context).name == "local"


def test_a_missing_backend_names_what_to_install(world: World) -> None:
    world.plugin("pubsub", dist="wetware", extras=("evm",))
    with pytest.raises(PluginError, match=r"auth backend 'evm' \(--auth\)") as caught:
        world.load(policy=NODE, auth="evm")
    assert caught.value.hint == "pip install 'wetware[evm]'"
    assert caught.value.exit_code == EXIT_CONFIG


def boom(ctx: object) -> object:
    raise OSError("no chain")


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (lambda ctx: None, "returned no auth backend"),
        (lambda ctx: SimpleNamespace(), "has no method run()"),
        (lambda ctx: Backend("local"), "returned the auth backend 'local', not 'bad'"),
        (boom, "OSError: no chain"),
    ],
)
def test_a_failed_backend_never_falls_back(world: World, hook: object, why: str) -> None:
    world.plugin("auth_bad", ww_register_auth=hook)
    for policy in (NODE, CHECK):
        loaded = world.load(policy=policy, auth="bad")
        with pytest.raises(PluginError, match=re.escape(why)):
            loaded.auth(context)
        with pytest.raises(PluginError, match="failed"):
            loaded.auth(context)


def test_a_backends_own_advice_reaches_the_operator(world: World) -> None:
    def no_key(ctx: object) -> object:
        raise KeyFileError("no key at x", hint="ww key new", code="key.missing")

    world.plugin("auth_x", ww_register_auth=no_key)
    with pytest.raises(KeyFileError, match="no key at x"):
        world.load(policy=NODE, auth="x").auth(context)


def test_a_plugin_that_is_no_backend_cannot_be_selected(world: World) -> None:
    world.plugin("pubsub")
    with pytest.raises(PluginError, match="is no auth backend"):
        world.load(policy=NODE, auth="pubsub").auth(context)


def test_disabling_the_selected_backend_is_an_error(world: World) -> None:
    with pytest.raises(ConfigError, match=r"selects 'auth_local'.*line 2.*forbids"):
        world.load('[plugins]\ndisable = ["auth_local"]', NODE)
    assert len(world.load('[plugins]\ndisable = ["auth_local"]').problems) == 1


# --- the recorder ---


def test_the_selected_recorder_gets_a_signer_of_its_own(world: World) -> None:
    def mine(ctx: Any, sign: Any) -> Recorder:
        return Recorder("mine", sign=sign)

    world.plugin("mine", ww_register_recorder=mine)
    assert world.load(policy=NODE).recorder(context, sign_as).name == "audit"
    loaded = world.load(policy=NODE, audit="mine")
    made: Any = loaded.recorder(context, sign_as)
    assert made.name == "mine"
    assert made.given["sign"](b"x") == b"minex"


def test_an_enable_list_of_before_keeps_the_recorder(world: World) -> None:
    loaded = world.load('[plugins]\nenable = ["auth_local"]', NODE)
    assert loaded.recorder(context, sign_as) is not None
    loaded = world.load('[plugins]\nenable = ["auth_local"]', NODE, audit="none")
    assert loaded.recorder(context, sign_as) is None
    assert status(loaded, "audit").state is State.DISABLED


def test_no_recorder_has_to_be_written_down(world: World) -> None:
    del world.offers[0]
    with pytest.raises(PluginError, match="no installed plugin is the recorder 'audit'") as caught:
        world.load(policy=NODE)
    assert caught.value.exit_code == EXIT_CONFIG
    assert world.load(policy=NODE, audit="none").recorder(context, sign_as) is None
    with pytest.raises(PluginError, match="recorder 'other'"):
        world.load(policy=NODE, audit="other")
    with pytest.raises(PluginError, match="recorder 'other'"):
        world.load(audit="other").recorder(context, sign_as)


def test_disabling_the_recorder_is_an_error(world: World) -> None:
    with pytest.raises(ConfigError, match=r"audit selects 'audit'.*line 2.*forbids"):
        world.load('[plugins]\ndisable = ["audit"]', NODE)
    world.load('[plugins]\ndisable = ["audit"]', NODE, audit="none")


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (lambda ctx: None, "returned no recorder"),
        (lambda ctx: SimpleNamespace(run=1), "has no method run()"),
        (lambda ctx: Recorder("other"), "returned the recorder 'other', not 'bad'"),
        (boom, "OSError: no chain"),
    ],
)
def test_a_failed_recorder_stops_a_node(world: World, hook: object, why: str) -> None:
    world.plugin("bad", ww_register_recorder=hook)
    for policy in (NODE, CHECK):
        loaded = world.load(policy=policy, audit="bad")
        with pytest.raises(PluginError, match=re.escape(why)) as caught:
            loaded.recorder(context, sign_as)
        assert caught.value.exit_code == EXIT_CONFIG


def test_a_plugin_that_is_no_recorder_cannot_be_selected(world: World) -> None:
    world.plugin("pubsub")
    with pytest.raises(PluginError, match="is no recorder"):
        world.load(policy=NODE, audit="pubsub").recorder(context, sign_as)


# --- settings ---


@dataclass(frozen=True, slots=True)
class Settings:
    size: int = field(default=4, metadata={"help": "Of it."})


def test_a_plugin_gets_its_typed_settings(world: World) -> None:
    seen: list[object] = []
    world.plugin(
        "a",
        ww_register_config=lambda: Settings,
        ww_register_services=lambda ctx: seen.append(ctx.config) or (),
    )
    loaded = world.load("[plugins.a]\nsize = 9", NODE)
    loaded.services(context)
    assert seen == [Settings(9)]
    assert loaded.schemas["a"] is Settings


def test_a_wrong_setting_of_a_plugin_stops_a_node_and_is_reported_elsewhere(world: World) -> None:
    world.plugin("a", ww_register_config=lambda: Settings)
    for text in ("[plugins.a]\nsiez = 9", "[plugins.aa]\n", "[plugins.auth_local]\nx = 1"):
        with pytest.raises(ConfigError, match="line"):
            world.load(text, NODE)
    loaded = world.load("[plugins.a]\nsiez = 9")
    assert "mean size?" in status(loaded, "a").reason


def test_settings_of_a_plugin_that_is_not_loaded_are_left_alone(world: World) -> None:
    world.plugin("a", ww_register_config=lambda: 1 / 0)
    loaded = world.load("[plugins.a]\nwhatever = 9", NODE)
    assert status(loaded, "a").state is State.FAILED


# --- commands, discovery ---


def test_a_command_that_typer_refuses_mounts_nothing(world: World) -> None:
    def bad(app: typer.Typer) -> None:
        @app.command("bad")
        def command(x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - the defect

    world.plugin("a", ww_register_commands=bad)
    app = typer.Typer()
    loaded = world.load()
    mount.mount(loaded, app)
    assert app.registered_commands == []
    assert status(loaded, "a").reason.startswith("in ww_register_commands: NameError")


def test_sub_apps_and_callbacks(world: World) -> None:
    def group(app: typer.Typer) -> None:
        sub = typer.Typer()
        sub.command("add")(lambda: None)
        app.add_typer(sub, name="user")

    def callback(app: typer.Typer) -> None:
        app.callback()(lambda: None)

    world.plugin("a", ww_register_commands=group)
    world.plugin("b", ww_register_commands=group)
    world.plugin("c", ww_register_commands=callback)
    app = typer.Typer()
    loaded = world.load()
    mount.mount(loaded, app)
    assert [mount.command_name(g) for g in app.registered_groups] == ["user"]
    assert "'user' has the name of one of 'a'" in status(loaded, "b").reason
    assert "sets a callback" in status(loaded, "c").reason


def test_a_broken_configuration_stops_plugin_commands_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.toml").write_text("[")
    monkeypatch.setenv("WW_HOME", str(tmp_path))
    app = typer.Typer()
    app.command("config")(lambda: None)
    for argv in (["--config", str(tmp_path / "bad.toml")], [f"--config={tmp_path}/bad.toml"]):
        mount.mount_commands(app, [*argv, "config", "check"])
        with pytest.raises(ConfigError, match="not valid TOML"):
            mount.mount_commands(app, [*argv, "pub"])
    mount.mount_commands(app, ["--help"])


def test_discoveries_are_isolated_too(world: World) -> None:
    good = SimpleNamespace(name="mdns", advertise=print, find_peers=print)
    world.plugin("a", ww_register_discovery=boom)
    world.plugin("b", ww_register_discovery=lambda ctx: good)
    world.plugin("c", ww_register_discovery=lambda ctx: None)
    world.plugin("d", ww_register_discovery=lambda ctx: "x")
    loaded = world.load()
    assert loaded.discoveries(context) == (good,)
    states = [str(status(loaded, name).state) for name in "abcd"]
    assert states == ["failed", "loaded", "loaded", "failed"]


# --- the contract ---


def test_every_hook_is_documented_and_called() -> None:
    text = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    files = [*(ROOT / "core/wetware/loader").glob("*.py"), ROOT / "core/wetware/cli/mount.py"]
    source = "".join(file.read_text() for file in files)
    assert set(HOOKS) == set(re.findall(r"^## (ww_\w+)", text, re.MULTILINE))
    for hook in HOOKS:
        assert f'"{hook}"' in source, f"nothing calls {hook}"


def test_what_plugins_are_made_of_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert f"`{CLIENT_GROUP}`" in sections["Client classes"]
    assert f"`{SIGNER_GROUP}`" in sections["Signers"]
    assert "`wetware.rpc.Servant`" in sections["Servants"]
    schema = (ROOT / "core" / "wetware" / "schema" / "ww.capnp").read_text()
    marks = {f"$Ww.{name}" for name in re.findall(r"^annotation (\w+)", schema, re.MULTILINE)}
    marks |= {f"Ww.{name}" for name in re.findall(r"^interface (\w+)", schema, re.MULTILINE)}
    assert {mark for mark in marks if f"`{mark}`" not in sections["Schema marks"]} == set()
    for_authors = {name for name in testing.__all__ if not name.isupper()} - FOR_THE_CORE
    told = set(re.findall(r"`(\w+)", sections["Testing"]))
    assert for_authors - told == set()


FOR_THE_CORE = {"end_with_parent", "tasks_of_core"}
"""What is in `wetware.testing` for wetware's own tests."""


# --- which wetware a plugin is written for --------------------------------------------------------


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ("wetware>=99", "needs wetware >=99; this is "),
        ("Wetware[evm] (<0.0.1)", "needs wetware <0.0.1; this is "),
        ("wetware>=0.0.1,<99", ""),
        ("wetware>=0.0.1.dev1", ""),
        ("wetware", ""),
        ("wetware>=99; extra == 'later'", ""),
        ("wetware>=99; python_version < '3'", ""),
        ("wetware-tools>=99", ""),
        ("no requirement at all ~", ""),
    ],
)
def test_a_plugin_for_another_wetware_is_not_loaded(
    world: World, requires: str, reason: str
) -> None:
    world.plugin("theirs", requires=("anyio>=4", requires))
    found = status(world.load(), "theirs")
    if not reason:
        assert found.state is State.LOADED, found
        return
    assert found.state is State.UNAVAILABLE
    assert found.reason.startswith(reason)
    assert found.remedy == "pip install --upgrade wetware ww-theirs"
    assert not found.hooks, "nothing of it was imported"


def test_a_node_does_not_start_without_a_named_plugin_for_another_wetware(world: World) -> None:
    world.plugin("theirs", requires=("wetware>=99",))
    assert status(world.load(policy=NODE), "theirs").state is State.UNAVAILABLE
    with pytest.raises(PluginError, match="needs wetware >=99") as refused:
        world.load('[plugins]\nenable = ["theirs"]', NODE)
    assert refused.value.exit_code == EXIT_CONFIG
