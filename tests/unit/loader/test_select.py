"""Which plugins the configuration selects."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tests.packaging.third_party import BROKEN, install_broken
from tests.unit.loader.world import (
    CHECK,
    NODE,
    Backend,
    Recorder,
    World,
    boom,
    context,
    service,
    sign_as,
    status,
)

from wetware import loader
from wetware.errors import EXIT_CONFIG, ConfigError, KeyFileError, PluginError, SchemaError
from wetware.loader import State

if TYPE_CHECKING:
    from collections.abc import Callable


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
    assert world.load(policy=CHECK, auth="other").services(context) == {}, "it may make keys"


def test_further_backends_are_asked_too_and_none_twice(world: World) -> None:
    for name in ("other", "third"):
        world.plugin(
            f"auth_{name}",
            ww_register_auth=lambda ctx: Backend(ctx.name.removeprefix("auth_")),
            ww_register_services=lambda ctx: [service(f"{ctx.name}_admin")],
        )
    loaded = world.load(policy=NODE, auth_also=("other",))
    assert loaded.auth(context).name == "local"
    assert [backend.name for backend in loaded.auth_also(context)] == ["other"]
    assert list(loaded.services(context)) == ["auth_other_admin"]
    tried = Backend("toy")
    tried.try_out = "a toy"  # type: ignore[attr-defined]
    world.plugin("auth_toy", ww_register_auth=lambda ctx: tried)
    with pytest.raises(ConfigError, match="'toy' would decide by what was made for a try-out"):
        world.load(policy=NODE, auth_also=("toy",)).auth_also(context)
    for twice in (("local",), ("auth_local",), ("other", "auth_other")):
        with pytest.raises(ConfigError, match="is selected twice: local"):
            world.load(policy=NODE, auth_also=twice)
    with pytest.raises(PluginError, match=r"auth backend 'gone' \(--auth-also"):
        world.load(policy=NODE, auth_also=("gone",))
    with pytest.raises(ConfigError, match=r"auth_also selects 'auth_other'.*forbids"):
        world.load('[plugins]\ndisable = ["auth_other"]', NODE, auth_also=("other",))


def test_a_third_party_called_local_is_not_the_backend_local(world: World) -> None:
    world.plugin("local", ww_register_auth=lambda ctx: pytest.fail("asked"))
    assert world.load(policy=NODE).auth(context).name == "local"


def test_a_missing_backend_names_what_to_install(world: World) -> None:
    world.plugin("pubsub", dist="wetware", extras=("evm",))
    with pytest.raises(PluginError, match=r"auth backend 'evm' \(--auth\)") as caught:
        world.load(policy=NODE, auth="evm")
    assert caught.value.hint == "pip install 'wetware[evm]'"
    assert caught.value.exit_code == EXIT_CONFIG


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
