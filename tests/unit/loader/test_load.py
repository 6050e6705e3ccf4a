"""Plugins are loaded and asked one by one: a broken one is reported, and harms nobody."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import typer
from tests.packaging.third_party import BROKEN, GOOD, install, install_broken
from tests.unit.loader.world import CHECK, NODE, SHORT, World, boom, context, service, status

from wetware import loader
from wetware.cli import mount
from wetware.cli.root import command_name
from wetware.errors import EXIT_CONFIG, ConfigError, PluginError
from wetware.hookspecs import setting
from wetware.loader import State

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    assert [command_name(c) for c in app.registered_commands] == ["node", "greet"]
    assert loaded.auth(context).name == "local"


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


# --- settings ---


@dataclass(frozen=True, slots=True)
class Settings:
    size: int = setting(4, "Of it.")


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


def _stuck(value: int) -> None:
    if value == 9:
        time.sleep(3600)


@dataclass(frozen=True, slots=True)
class Stuck:
    size: int = setting(4, "Of it.", check=_stuck)


@dataclass(frozen=True, slots=True)
class Raises:
    size: int = setting(4, "Of it.", check=lambda value: len(str(value)) // (9 - value))


@dataclass(frozen=True, slots=True)
class Combined:
    size: int = setting(4, "Of it.")

    def __post_init__(self) -> None:
        if self.size == 9:
            raise TypeError("no")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (Stuck, "hung in the check of its settings: not done after 0.3 s"),
        (Raises, "in the check of its settings: ZeroDivisionError"),
        (Combined, "in the check of its settings: TypeError: no"),
    ],
)
def test_what_a_plugin_checks_of_its_settings_is_judged_as_its_hooks_are(
    world: World, schema: type, reason: str
) -> None:
    world.plugin("a", ww_register_config=lambda: schema)
    world.plugin("b", ww_register_config=lambda: Settings)
    text = "[plugins.a]\nsize = 9\n[plugins.b]\nsize = 9\n"
    loaded = world.load(text, replace(SHORT, strict=True))
    assert reason in status(loaded, "a").reason
    assert (status(loaded, "a").state, status(loaded, "b").config) == (State.FAILED, Settings(9))
    enabled = world.load(f'[plugins]\nenable = ["a"]\n{text}', SHORT)
    assert [reason in problem.message for problem in enabled.problems] == [True]


def test_what_a_plugin_checks_is_not_run_again_outside_of_the_guard(world: World) -> None:
    seen: list[int] = []

    @dataclass(frozen=True, slots=True)
    class Counts:
        size: int = setting(4, "Of it.", check=seen.append)

    world.plugin("a", ww_register_config=lambda: Counts)
    world.plugin("b", ww_register_config=lambda: Combined)
    found = world.config("[plugins.a]\nsize = 9\n[plugins.b]\nsize = 9\n")
    loaded = loader.load(found, CHECK, offers=tuple(world.offers))
    assert found.problems(loaded.schemas) == []
    assert found.settings(loaded.schemas)
    assert seen == [9]


def test_settings_of_a_plugin_that_is_not_loaded_are_left_alone(world: World) -> None:
    world.plugin("a", ww_register_config=lambda: 1 / 0)
    loaded = world.load("[plugins.a]\nwhatever = 9", NODE)
    assert status(loaded, "a").state is State.FAILED


# --- discoveries ---


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
