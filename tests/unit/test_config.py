"""ww.toml, variables and flags: precedence, types, and errors that say where and what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wetware import config
from wetware.base.multiaddr import Multiaddr
from wetware.base.setting import setting
from wetware.cli.config import reference
from wetware.config import Config, NodeConfig, check_schema, describe
from wetware.config.file import FILE_BYTES_MAX, File
from wetware.config.sections import SECTIONS
from wetware.errors import EXIT_CONFIG, ConfigError, PluginError
from wetware.identity import Key

PEER = Key.from_seed(b"p" * 32).peer_id
OTHER = Key.from_seed(b"q" * 32).peer_id

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a configuration of its text, variables and flags in a home of its own."""

    def make(
        text: str | None = None, env: Mapping[str, str] | None = None, **flags: object
    ) -> Config:
        if text is not None:
            (tmp_path / "ww.toml").write_text(text)
        given = {key.replace("__", "."): value for key, value in flags.items()}
        return config.load(given, env={"WW_HOME": str(tmp_path), **(env or {})})

    return make


@dataclass(frozen=True, slots=True)
class Sample:
    """Every supported type."""

    text: str = setting("a", "What it is.")
    count: int = setting(3, "How many.", min=1, max=10)
    rate: float = setting(0.5, "What it is.")
    on: bool = setting(False, "What it is.")
    path: Path = setting(Path("x"), "What it is.")
    maybe: int | None = setting(None, "What it is.")
    names: tuple[str, ...] = setting(("a",), "What it is.")
    sizes: tuple[int, ...] = setting((), "What it is.")
    level: Literal["low", "high"] = setting("low", "What it is.")
    addr: Multiaddr | None = setting(None, "What it is.")
    wait_s: float = setting(1.0, "Patience.")
    inner: int = 7


# --- precedence ---


def test_defaults_need_nothing(load: Load, tmp_path: Path) -> None:
    found = load()
    assert found.node == NodeConfig(data_dir=tmp_path / "node")
    assert [str(addr) for addr in found.node.listen] == ["/ip4/0.0.0.0/tcp/4001"]
    assert found.node.auth == "local"
    assert found.plugins.enable is None
    assert not found.exists
    assert found.home == tmp_path
    assert found.keys_dir == tmp_path / "keys"


def test_flags_beat_environment_beats_file_beats_default(load: Load) -> None:
    text = '[node]\nname = "file"\nauth = "file"\nlog_level = "error"\n'
    env = {"WW_NODE_NAME": "env", "WW_NODE_AUTH": "env"}
    found = load(text, env, node__name="flag", node__log_format=None)
    node = found.node
    assert (node.name, node.auth, node.log_level, node.log_format) == (
        "flag",
        "env",
        "error",
        "text",
    )
    assert [found.origin(f"node.{key}").kind for key in ("name", "auth", "log_level")] == [
        "flag",
        "env",
        "file",
    ]
    assert str(found.origin("node.name")) == "--name"
    assert str(found.origin("node.auth")) == "WW_NODE_AUTH"
    assert str(found.origin("node.log_level")).endswith("ww.toml line 4")
    assert found.origin("node.log_format").kind == "default"


def test_what_somebody_gave_is_told_from_defaults(load: Load) -> None:
    found = load('[node]\nname = "a"\n', {"WW_NODE_AUTH": "local"}, node__dev=True)
    assert found.node.name == "a"
    assert found.given("node") == {"name", "auth", "dev"}
    assert found.given("plugins.none") == frozenset()


def test_the_limits_are_the_dataclasses_of_the_parts(load: Load) -> None:
    from wetware.broker.limits import LoginLimits
    from wetware.overlay.link import LinkLimits

    found = load("[link]\nconnections_max = 7\n[login]\ndeadline_s = 5\n")
    assert found.link == dataclasses.replace(LinkLimits(), connections_max=7)
    assert found.login == dataclasses.replace(LoginLimits(), deadline_s=5.0)


def test_peers_are_addresses_to_dial(load: Load) -> None:
    addr = f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}"
    other = f"/dns/b.example/tcp/1/p2p/{OTHER}"
    found = load(env={"WW_NODE_PEERS": f"{addr}, {other}"}).node
    assert found.peers == (Multiaddr.parse(addr), Multiaddr.parse(other))


def test_labels(load: Load) -> None:
    assert load('[node]\nlabels = ["zone=home", "gpu=a b"]').node.labels == ("zone=home", "gpu=a b")
    for bad in ("zone", "=x", "zone=", "Zone=x", "a b=c", "zone=a,b", "zone=a=b", "zone=!x"):
        with pytest.raises(ConfigError, match="is not a label"):
            _ = load(node__labels=(bad,)).node


def test_open_protocols(load: Load) -> None:
    found = load('[node]\nopen_protocols = ["/ipfs/bitswap/1.2.0"]').node
    assert found.open_protocols == ("/ipfs/bitswap/1.2.0",)
    for bad in ("bitswap", "/a b", "/" + "x" * 140):
        with pytest.raises(ConfigError, match="is not a protocol ID"):
            _ = load(node__open_protocols=(bad,)).node


def test_a_secret_of_a_wrong_type_is_not_shown(load: Load) -> None:
    @dataclass(frozen=True)
    class Keys:
        urls: tuple[str, ...] = setting((), "URLs.", secret=True)

    with pytest.raises(ConfigError, match="expected") as info:
        load('[plugins.x]\nurls = "https://host/key"').plugin("x", Keys)
    assert "key" not in str(info.value)


def test_a_secret_is_not_shown(load: Load) -> None:
    shown = {each.key: each for each in load('[node]\njoin = "wwt1secret"').settings({})}
    assert (shown["node.join"].text, shown["node.join"].plain) == ("(hidden)", "(hidden)")
    assert shown["node.name"].text != "(hidden)"


def test_a_file_is_named_by_flag_or_variable_and_must_exist(load: Load, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other.toml"
    elsewhere.write_text('[node]\nname = "x"\n')
    env = {"WW_HOME": str(tmp_path), "WW_CONFIG": str(elsewhere)}
    assert config.load(env=env).node.name == "x"
    with pytest.raises(ConfigError, match=r"no configuration file at .*missing\.toml") as caught:
        config.load(path=tmp_path / "missing.toml", env=env)
    assert caught.value.exit_code == EXIT_CONFIG


def test_relative_paths_are_relative_to_their_source(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load('[node]\ndata_dir = "d"').node.data_dir == tmp_path / "d"
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert load(env={"WW_NODE_DATA_DIR": "d"}).node.data_dir == tmp_path / "cwd" / "d"
    assert load(node__data_dir="../d").node.data_dir == tmp_path / "d"


# --- types ---


def test_every_type_from_the_file(load: Load, tmp_path: Path) -> None:
    found = load(
        """[plugins.sample]
        text = "b"
        count = 4
        rate = 2
        on = true
        path = "p/q"
        maybe = 5
        names = ["x", "y"]
        sizes = [1, 2]
        level = "high"
        addr = "/dns/a.example/tcp/80"
        """
    ).plugin("sample", Sample)
    assert found == Sample(
        text="b",
        count=4,
        rate=2.0,
        on=True,
        path=tmp_path / "p/q",
        maybe=5,
        names=("x", "y"),
        sizes=(1, 2),
        level="high",
        addr=Multiaddr("dns", "a.example", 80),
    )
    assert isinstance(found.rate, float)


def test_every_type_from_variables(load: Load) -> None:
    values = {
        "TEXT": "b",
        "COUNT": "4",
        "RATE": "2.5",
        "ON": "yes",
        "PATH": "/p",
        "MAYBE": "7",
        "NAMES": "x, y",
        "SIZES": "1,2",
        "LEVEL": "high",
        "ADDR": "/dns/a.example/tcp/80",
    }
    env = {f"WW_PLUGINS_SAMPLE_{key}": value for key, value in values.items()}
    assert load(env=env).plugin("sample", Sample) == Sample(
        text="b",
        count=4,
        rate=2.5,
        on=True,
        path=Path("/p"),
        maybe=7,
        names=("x", "y"),
        sizes=(1, 2),
        level="high",
        addr=Multiaddr("dns", "a.example", 80),
    )


def test_an_emptied_enable_does_not_mean_everything(load: Load) -> None:
    assert load(env={"WW_PLUGINS_ENABLE": ""}).plugins.enable == ()


# --- sections of sections ---


@dataclass(frozen=True, slots=True)
class Zoo:
    """A plugin whose setting is a section of sections."""

    animals: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "By name."}
    )
    open: bool = setting(True, "What it is.")


ZOO = """[plugins.zoo]
open = false
[plugins.zoo.animals.cat]
legs = 4
names = ["Tom", "Felix"]
home = { town = "Ulm", at = 1.5 }
[plugins.zoo.animals."red fox"]
wild = true
"""


def test_a_section_of_sections(load: Load) -> None:
    found = load(ZOO)
    assert found.plugin("zoo", Zoo).animals == {
        "cat": {"legs": 4, "names": ["Tom", "Felix"], "home": {"town": "Ulm", "at": 1.5}},
        "red fox": {"wild": True},
    }
    assert found.unknown_plugins({"zoo": Zoo}) == []
    assert Zoo().animals == {}
    shown = {each.key: each for each in found.settings({"zoo": Zoo})}["plugins.zoo.animals"]
    assert shown.text == (
        '{cat = {legs = 4, names = ["Tom", "Felix"], home = {town = "Ulm", at = 1.5}}, '
        '"red fox" = {wild = true}}'
    )
    assert shown.plain == found.plugin("zoo", Zoo).animals
    assert str(shown.origin).endswith("ww.toml line 3")
    assert check_schema(Zoo) is Zoo
    assert "| `animals` | a section of sections | `{}` | By name. |" in describe({"zoo": Zoo})


def test_what_is_shown_of_a_section_of_sections_is_toml(load: Load) -> None:
    first = load(ZOO).plugin("zoo", Zoo)
    shown = {each.key: each for each in load(ZOO).settings({"zoo": Zoo})}["plugins.zoo.animals"]
    again = load(f"[plugins.zoo]\nopen = false\nanimals = {shown.text}\n").plugin("zoo", Zoo)
    assert again == first


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("animals = 3", ["plugins.zoo.animals in", "line 2", "a section of sections", "number 3"]),
        ("animals.cat = 3", ["plugins.zoo.animals in", "line 2", "a section of sections"]),
    ],
)
def test_what_is_wrong_in_a_section_of_sections(load: Load, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"[plugins.zoo]\n{text}\n").plugin("zoo", Zoo)
    assert caught.value.code == "config.type"
    for part in parts:
        assert part in caught.value.message, caught.value.message


def test_a_section_of_sections_is_not_a_variables_text(load: Load) -> None:
    with pytest.raises(ConfigError, match="WW_PLUGINS_ZOO_ANIMALS") as caught:
        load(env={"WW_PLUGINS_ZOO_ANIMALS": "cat"}).plugin("zoo", Zoo)
    assert caught.value.hint == "write [plugins.zoo.animals.NAME]"


def _no_dogs(animals: Mapping[str, Mapping[str, Any]]) -> None:
    for name, animal in animals.items():
        if animal.get("barks"):
            raise ValueError(f"{name}.barks: no dogs")


def test_a_check_of_a_section_of_sections_says_where(load: Load) -> None:
    @dataclass(frozen=True)
    class Kennel:
        animals: Mapping[str, Mapping[str, Any]] = field(
            default_factory=dict, metadata={"help": "By name.", "check": _no_dogs}
        )

    cat = "[plugins.kennel.animals.cat]\nlegs = 4\n"
    for dog, line in (("barks = true\n", 4), ("legs = 4\nbarks = true\n", 5)):
        with pytest.raises(ConfigError, match=rf"ww\.toml line {line}: rex\.barks: no dogs"):
            load(f"{cat}[plugins.kennel.animals.rex]\n{dog}").plugin("kennel", Kennel)
    inline = f"{cat}[plugins.kennel.animals]\nrex = {{ barks = true }}\n"
    with pytest.raises(ConfigError, match=r"ww\.toml line 4: rex\.barks: no dogs"):
        load(inline).plugin("kennel", Kennel)


# --- errors: what, where, what instead ---


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("[node]\nlistn = []", "config.unknown", ["node.listn", "ww.toml line 2", "mean listen?"]),
        ("[noed]\n", "config.unknown", ["[noed]", "line 1", "mean node?"]),
        ("x = 1", "config.unknown", ["x in", "no such section"]),
        ("[broker]\ngrant_max = 1", "config.unknown", ["line 2", "mean grants_max?"]),
        ("[link]\ndial_s = 1", "config.unknown", ["link.dial_s", "line 2", "no such setting"]),
        ("[rpc]\n", "config.unknown", ["[rpc]", "line 1", "no such section"]),
        ("[plugins]\nenabel = []", "config.unknown", ["plugins.enabel", "mean enable?"]),
        ("node = 3", "config.type", ["node", "expected a section", "got the number 3"]),
        ('[node]\nlisten = "x"', "config.type", ["node.listen", "a list of addresses", 'got "x"']),
        ("[node]\nname = true", "config.type", ["expected text", "got true", "line 2"]),
        ('[node]\nlog_level = "loud"', "config.type", ['"debug", "info"', 'got "loud"']),
        ('[node]\nlisten = ["/ip4/1.2.3/tcp/1"]', "config.multiaddr", ["'1.2.3'", "line 2"]),
        ('[node]\nlisten = ["/ip4/1.2.3.4/udp/1"]', "config.multiaddr", ["'udp'", "only tcp"]),
        (f'[node]\nlisten = ["/ip4/1.2.3.4/tcp/1/p2p/{PEER}"]', "config.value", ["/p2p/"]),
        (f'[node]\nannounce = ["/ip4/1.2.3.4/tcp/1/p2p/{PEER}"]', "config.value", ["/p2p/"]),
        ('[node]\nannounce = ["/ip4/1.2.3.4/tcp/0"]', "config.value", ["port 0"]),
        ('[node]\nannounce = ["/dns/localhost/tcp/1"]', "config.value", ["others to themselves"]),
        ('[node]\nannounce = ["/ip4/0.0.0.0/tcp/1"]', "config.value", ["others can dial"]),
        ('[node]\nannounce = ["/ip6/fe80::1/tcp/1"]', "config.value", ["others can dial"]),
        ('[node]\npeers = ["/ip4/1.2.3.4/tcp/1"]', "config.value", ["must end in /p2p/PEER_ID"]),
        (f'[node]\npeers = ["/ip4/1.2.3.4/tcp/0/p2p/{PEER}"]', "config.value", ["port 0"]),
        ('[node]\npeers = ["nonsense"]', "config.multiaddr", ["nonsense", "line 2"]),
        ('[node]\nauth = "no such!"', "config.value", ["not a plugin's name"]),
        ('[node]\nname = "a\\u0000b"', "config.value", ["zero byte"]),
        ("[login]\ndeadline_s = 0", "config.range", ["0.0 is out of range; 0.1 to 600"]),
        ("[admission]\ncertificate_s = 1e9", "config.range", ["out of range; 1 to 31622400"]),
        ("[link]\nconnections_max = 0", "config.range", ["0 is out of range; 1 or more"]),
        ("[login]\ndeadline_s = nan", "config.type", ["expected a number"]),
        ("[login]\ndeadline_s = inf", "config.type", ["expected a number"]),
        ('[login]\ndeadline_s = "10"', "config.type", ["expected a number", 'got "10"']),
        ("[login]\nsessions_max = 1.5", "config.type", ["a whole number", "1.5"]),
        ("[login]\nsessions_max = true", "config.type", ["a whole number", "got true"]),
    ],
)
def test_what_is_wrong_in_a_file(load: Load, text: str, code: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        raise_first(load(text))
    assert caught.value.code == code
    for part in parts:
        assert part in caught.value.message, caught.value.message


def raise_first(found: Config) -> None:
    for problem in found.problems():
        raise problem


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"WW_NODE_LISTN": "x"}, ["WW_NODE_LISTN", "did you mean WW_NODE_LISTEN?"]),
        ({"WW_NOED_LISTEN": "x"}, ["WW_NOED_LISTEN", "did you mean WW_NODE_LISTEN?"]),
        ({"WW_NODE_LISTEN": "x"}, ["node.listen (WW_NODE_LISTEN)", "bad address 'x'"]),
        ({"WW_LOGIN_SESSIONS_MAX": "x"}, ["(WW_LOGIN_SESSIONS_MAX)", "a whole number", '"x"']),
        ({"WW_LOGIN_SESSIONS_MAX": "0"}, ["(WW_LOGIN_SESSIONS_MAX)", "1 or more"]),
        ({"WW_LOGIN_GATES_MAX": "9"}, ["WW_LOGIN_GATES_MAX", "no such setting"]),
    ],
)
def test_what_is_wrong_in_a_variable(load: Load, env: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        raise_first(load(env=env))
    for part in parts:
        assert part in caught.value.message


def test_a_variable_that_is_no_setting_stops_a_node_and_no_other_command(load: Load) -> None:
    env = {"WW_RPC_CALLS_MAX": "1", "WW_MEMBERSHIP_PROBE_S": "1", "WW_OTHER": "1", "WW_KEY": "x"}
    found = load(env=env)
    assert found.problems() == []
    first, second = found.problems({})
    assert "WW_RPC_CALLS_MAX: nothing installed has this setting" in first.message
    assert "unset it" in first.hint
    assert "WW_MEMBERSHIP_PROBE_S" in second.message


@dataclass(frozen=True)
class Empty:
    name: str = setting("", "What it is.")
    chain: int = setting(0, "What it is.", min=1)


@pytest.mark.parametrize("text", ['name = ""', "name = 1", 'chain = "x"'])
def test_no_hint_proposes_what_is_refused(load: Load, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"[plugins.empty]\n{text}\n").plugin("empty", Empty)
    assert "=" not in caught.value.hint


def test_a_flag_that_is_wrong_is_named(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"node\.peers \(--peer\)"):
        _ = load(node__peers=("x",)).node


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    """Some editors begin every text with one."""
    file = tmp_path / "ww.toml"
    file.write_bytes(b'\xef\xbb\xbf[node]\nname = "x"\n')
    assert config.load(path=file, env={"WW_HOME": str(tmp_path)}).node.name == "x"


def test_bad_toml_names_file_and_line(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ww\.toml is not valid TOML: .*line 2") as caught:
        load("[node]\nlisten = [\n")
    assert caught.value.code == "config.toml"
    (tmp_path / "ww.toml").write_bytes(b"[node]\nname = '\xff'\n")
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        load()


def test_an_unreadable_file_is_an_error_and_not_a_default(load: Load, tmp_path: Path) -> None:
    (tmp_path / "ww.toml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*ww\.toml"):
        load()
    (tmp_path / "ww.toml").rmdir()
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load("#" * (FILE_BYTES_MAX + 1))


def test_all_problems_are_found_at_once(load: Load) -> None:
    found = load("[node]\nlistn = 1\nname = 2\n[login]\ndeadline_s = -1\n[plugins.x]\ny = 1\n")
    messages = [problem.message for problem in found.problems({})]
    assert len(messages) == 4
    assert "listn" in messages[0]
    assert "[plugins.x]" in messages[3]


@given(st.text(max_size=200))
def test_no_text_does_anything_but_load_or_refuse(text: str) -> None:
    try:
        parsed = File(Path("/h/ww.toml"), text)
    except ConfigError:
        return
    found = Config(Path("/h"), parsed, {}, {})
    assert all(isinstance(problem, ConfigError) for problem in found.problems({}))


_TOML_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(deadline=None)  # the first one resolves the annotations
@given(st.sampled_from([each.name for each in dataclasses.fields(Sample)]), _TOML_VALUES)
def test_a_value_is_of_its_type_or_refused(name: str, value: object) -> None:
    file = File(Path("/h/ww.toml"), "")
    file.data = {"plugins": {"sample": {name: value}}}
    found = Config(Path("/h"), file, {}, {})
    try:
        sample = found.plugin("sample", Sample)
    except ConfigError:
        return
    assert isinstance(getattr(sample, name), type(getattr(Sample(), name)) | int | str | Multiaddr)


# --- plugins' sections ---


def test_a_field_without_a_text_is_no_setting(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.sample\.inner .*no such setting"):
        load("[plugins.sample]\ninner = 1\n").plugin("sample", Sample)
    found = load("")
    assert found.plugin("sample", Sample).inner == 7
    keys = [each.key for each in found.settings({"sample": Sample})]
    assert "plugins.sample.text" in keys
    assert "plugins.sample.inner" not in keys


def test_a_plugins_unknown_setting_names_the_nearest(load: Load) -> None:
    found = load("[plugins.sample]\ncuont = 1\n")
    with pytest.raises(ConfigError, match=r"plugins\.sample\.cuont .*line 2.*mean count\?"):
        found.plugin("sample", Sample)


def test_sections_and_variables_of_no_plugin(load: Load) -> None:
    env = {"WW_PLUGINS_SAMPLE_CUONT": "1", "WW_PLUGINS_ABSENT_X": "1", "WW_PLUGINS_SHUT_X": "1"}
    found = load("[plugins.sampel]\n[plugins.shut]\nx = 1\n", env)
    messages = [p.message for p in found.unknown_plugins({"sample": Sample, "shut": None})]
    assert len(messages) == 3
    assert "[plugins.sampel]" in messages[0]
    assert "mean sample?" in messages[0]
    assert "WW_PLUGINS_SAMPLE_CUONT" in messages[1]
    assert "mean WW_PLUGINS_SAMPLE_COUNT?" in messages[1]
    assert "WW_PLUGINS_ABSENT_X" in messages[2]


def test_a_variable_of_a_plugin_whose_name_begins_like_anothers(load: Load) -> None:
    @dataclass(frozen=True)
    class Other:
        x: int = setting(1, "What it is.")

    found = load(env={"WW_PLUGINS_SAMPLE_TWO_X": "2"})
    assert found.plugin("sample", Sample) == Sample()
    assert found.plugin("sample_two", Other) == Other(2)
    assert found.unknown_plugins({"sample": Sample, "sample_two": Other}) == []


def test_a_value_where_a_plugins_section_belongs(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.pubsub .*line 2"):
        _ = load("[plugins]\npubsub = true\n").plugins


@dataclass(frozen=True)
class NoDefault:
    x: int


@dataclass
class NotFrozen:
    x: int = 1


@dataclass(frozen=True)
class BadType:
    x: dict[str, int] = field(default_factory=dict, metadata={"help": "By name."})


@dataclass(frozen=True)
class Numbers:
    x: Literal[1, 2] = setting(1, "What it is.")


@dataclass(frozen=True)
class NoSetting:
    x: int = 1


@dataclass(frozen=True)
class Unresolved:
    x: Nowhere = 1  # type: ignore[name-defined]  # noqa: F821 - what is tested


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (3, "is not a dataclass"),
        (int, "is not a dataclass"),
        (Sample(), "is not a dataclass"),
        (NotFrozen, "is not frozen"),
        (NoDefault, "no default for 'x'"),
        (BadType, "is not supported"),
        (Numbers, r"field 'x': .*Literal\[1, 2\] is not supported"),
        (NoSetting, "has no setting"),
        (Unresolved, "cannot be resolved"),
    ],
)
def test_a_config_class_is_judged(cls: object, why: str) -> None:
    with pytest.raises(PluginError, match=why):
        check_schema(cls)
    assert check_schema(Sample) is Sample


# --- the reference ---


def test_describe_tells_type_unit_range_default_and_meaning() -> None:
    text = describe({"sample": Sample})
    for line in (
        "| `count` | a whole number; 1 to 10 | `3` | How many. |",
        "| `wait_s` | a number, seconds; 0 or more | `1.0` | Patience. |",
        '| `names` | a list of text | `["a"]` | What it is. |',
        '| `level` | one of "low", "high" | `"low"` | What it is. |',
        "| `maybe` | a whole number; 0 or more | `none` | What it is. |",
    ):
        assert line in text
    assert "inner" not in text


def test_the_committed_reference_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
    assert path.read_text() == reference(), "run: ww config reference > docs/reference/config.md"


def test_show_gives_every_value_and_its_origin(load: Load) -> None:
    found = load(env={"WW_NODE_NAME": "ada"}).settings({"sample": Sample})
    by_key = {each.key: each for each in found}
    assert by_key["node.name"].text == '"ada"'
    assert str(by_key["node.name"].origin) == "WW_NODE_NAME"
    assert by_key["node.listen"].plain == ["/ip4/0.0.0.0/tcp/4001"]
    assert by_key["plugins.sample.level"].plain == "low"
    assert by_key["plugins.enable"].text == ""
    assert {key.partition(".")[0] for key in by_key} == set(SECTIONS)
