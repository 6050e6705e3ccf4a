"""What a user's machine remembers: the file, its bounds, and who may write it."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from wetware.client import contexts
from wetware.errors import ConfigError, InvalidArgument, NotFound
from wetware.identity import Key

GOOD = '{"v": 1, "current": "local", "contexts": {}, "clusters": {}}'
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
        GOOD.replace('"v": 1', '"v": 2'),
        GOOD.replace('"clusters": {}', '"clusters": []'),
        GOOD.replace('"clusters": {}', '"clusters": {"a": 1}'),
        GOOD.replace('"clusters": {}', '"clusters": {"a": "zz"}'),
        GOOD.replace('"contexts": {}', '"contexts": []'),
        GOOD.replace('"contexts": {}', '"contexts": {"a": {"node": 1}}'),
        GOOD.replace('"contexts": {}', '"contexts": {"a": {"cluster": "zz"}}'),
        GOOD.replace('"contexts": {}', '"contexts": {"a": {"other": ""}}'),
        GOOD.replace('"contexts": {}', '"contexts": {"a": {"name": "b"}}'),
        GOOD.replace('"contexts": {}', '"contexts": {"a": {"key": "\\u001b"}}'),
        GOOD.replace("local", "nobody"),
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


def test_the_good_file_is_read(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(GOOD)
    assert contexts.load() == contexts.Contexts()


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


# --- named contexts -------------------------------------------------------------------------------

CONTEXT = contexts.Context(node="zone=cloud", key="work", data_dir="/x")


def test_a_context_is_kept_used_and_forgotten() -> None:
    contexts.update(lambda known: known.add("a", CONTEXT).add("b", contexts.Context()))
    assert contexts.choose() == contexts.Context()
    contexts.update(lambda known: known.use("a"))
    assert contexts.choose() == contexts.choose("a") == replace(CONTEXT, name="a")
    assert contexts.choose("local") == contexts.Context()
    contexts.update(lambda known: known.pin("a", ONE))
    assert contexts.choose().cluster == ONE
    assert contexts.load().clusters == {}
    contexts.update(lambda known: known.remove("a"))
    assert contexts.choose() == contexts.Context()
    assert list(contexts.load().named) == ["b"]


def test_a_variable_names_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts.update(lambda known: known.add("a", CONTEXT).add("b", contexts.Context(key="b")))
    contexts.update(lambda known: known.use("b"))
    monkeypatch.setenv("WW_CONTEXT", "a")
    assert contexts.choose().key == "work"
    assert contexts.choose("b").key == "b"
    monkeypatch.setenv("WW_CONTEXT", "c")
    with pytest.raises(NotFound, match="there are: local, a, b"):
        contexts.choose()


PEER = Key.from_seed(bytes(32)).peer_id


@pytest.mark.parametrize("name", ["", "local", "a b", "-a", "x" * 41, PEER, "a/b", "ü", "a\n"])
def test_what_cannot_name_a_context(name: str) -> None:
    with pytest.raises(InvalidArgument):
        contexts.update(lambda known: known.add(name, CONTEXT))


def test_a_name_is_given_once_and_the_number_is_bounded() -> None:
    known = contexts.Contexts().add("a", CONTEXT)
    with pytest.raises(InvalidArgument, match="already"):
        known.add("a", CONTEXT)
    for n in range(contexts.CONTEXTS_MAX - 1):
        known = known.add(f"n{n}", CONTEXT)
    with pytest.raises(InvalidArgument, match="CONTEXTS_MAX"):
        known.add("one-more", CONTEXT)


@pytest.mark.parametrize("change", ["remove", "use"])
def test_what_is_not_there(change: str) -> None:
    with pytest.raises(NotFound):
        contexts.update(lambda known: getattr(known, change)("nobody"))
    with pytest.raises(InvalidArgument):
        contexts.update(lambda known: known.remove("local"))
