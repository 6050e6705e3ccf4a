"""What is said of a plugin that cannot be used."""

from __future__ import annotations

import pytest
from tests.unit.loader.world import World, status

from wetware.loader import State
from wetware.loader.report import REASON_CHARS_MAX


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
