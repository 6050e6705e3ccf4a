"""The commands of plugins, mounted on `ww`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from tests.unit.loader.world import World, status

from wetware.cli import mount
from wetware.cli.root import command_name
from wetware.errors import ConfigError


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
    assert [command_name(g) for g in app.registered_groups] == ["user"]
    assert "'user' has the name of one of 'a'" in status(loaded, "b").reason
    assert "sets a callback" in status(loaded, "c").reason


def test_each_backend_has_a_group_of_its_own_in_the_one_that_they_share(world: World) -> None:
    def backend(name: str, epilog: str) -> Callable[[typer.Typer], None]:
        def declare(app: typer.Typer) -> None:
            own, auth = typer.Typer(), typer.Typer()
            own.command("login")(lambda: None)
            auth.add_typer(own, name=name)
            app.add_typer(auth, name="auth", epilog=epilog)

        return declare

    def command(app: typer.Typer) -> None:
        app.command("auth")(lambda: None)

    def within(app: typer.Typer) -> None:
        auth = typer.Typer()
        auth.command("login")(lambda: None)
        app.add_typer(auth, name="auth")

    world.plugin("a", ww_register_commands=backend("acme", "Examples: acme"))
    world.plugin("b", ww_register_commands=backend("ldap", "Examples: ldap"))
    world.plugin("c", ww_register_commands=backend("acme", "Examples: another"))
    world.plugin("d", ww_register_commands=command)
    world.plugin("e", ww_register_commands=within)
    for _ in range(2):  # mounting twice adds nothing to what was mounted before
        app = typer.Typer()
        loaded = world.load()
        mount.mount(loaded, app)
        (group,) = app.registered_groups
        assert (command_name(group), group.epilog) == ("auth", "Examples: acme")
        assert group.typer_instance is not None
        found = [command_name(each) for each in group.typer_instance.registered_groups]
        assert found == ["acme", "ldap"]
    assert "'auth acme' has the name of one of 'a'" in status(loaded, "c").reason
    assert "a group that plugins share" in status(loaded, "d").reason
    assert "a group of its own belongs there" in status(loaded, "e").reason


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
