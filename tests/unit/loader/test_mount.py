"""The commands of plugins, mounted on `ww`."""

from __future__ import annotations

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
