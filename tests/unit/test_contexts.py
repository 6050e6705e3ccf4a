"""What a user's machine remembers: the file, its bounds, and who may write it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from wetware import contexts
from wetware.errors import ConfigError, InvalidArgument

ONE, TWO = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / contexts.FILE


def pin(node: str, cluster: str) -> None:
    contexts.update(lambda known: known.pin(node, cluster))


def test_nothing_is_known_at_first_and_reading_makes_no_file(file: Path) -> None:
    assert contexts.load() == contexts.Contexts()
    assert not file.parent.exists()


def test_a_pin_is_kept_in_a_file_of_the_user_alone(file: Path) -> None:
    pin("a", ONE)
    pin("b", ONE)
    pin("a", TWO)
    assert contexts.load().clusters == {"a": TWO, "b": ONE}
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == [contexts.FILE]


def test_the_number_of_pins_is_bounded() -> None:
    known = contexts.Contexts()
    for n in range(contexts.PINS_MAX + 5):
        known = known.pin(str(n), ONE)
    assert len(known.clusters) == contexts.PINS_MAX
    assert "4" not in known.clusters
    assert str(contexts.PINS_MAX + 4) in known.clusters


@pytest.mark.parametrize("cluster", ["", "x", "1" * 39, "1" * 41, "A" * 40, "$(id)" * 8])
def test_what_is_no_cluster_is_not_pinned(file: Path, cluster: str) -> None:
    with pytest.raises(InvalidArgument):
        pin("a", cluster)
    assert not file.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"v": 2, "clusters": {}}',
        '{"v": 1, "clusters": []}}',
        '{"v": 1, "clusters": {"a": 1}}',
        '{"v": 1, "clusters": {"a": "zz"}}',
        "[" * 100_000,
        "\0",
    ],
)
def test_a_damaged_file_is_no_empty_one(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ConfigError, match=contexts.FILE):
        contexts.load()
    with pytest.raises(ConfigError, match=contexts.FILE):
        pin("a", ONE)
    assert file.read_text() == text


def test_a_file_that_others_can_write_is_not_believed(file: Path) -> None:
    pin("a", ONE)
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="others can write"):
            contexts.load()


def test_where_nothing_can_be_written_it_is_said(file: Path) -> None:
    file.parent.write_text("not a directory")
    with pytest.raises(ConfigError, match=str(file)):
        pin("a", ONE)


def _pin_many(name: str) -> None:
    for n in range(20):
        pin(f"{name}{n}", ONE)


def test_processes_do_not_lose_each_other_s_pins(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_pin_many, args=(name,)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(json.loads(file.read_text())["clusters"]) == 80
