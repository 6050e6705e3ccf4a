"""What services propose becomes a configuration: a try-out's, or what an operator writes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from wetware.errors import ConfigError
from wetware_auth_evm.node.proposed import ROLES_FILE, how_to_accept, load, write
from wetware_auth_evm.node.roles import Rules

BOX = {"reader": frozenset({"Box.get"}), "member": frozenset({"Box.*", "Box.Item.read"})}


def test_the_first_start_of_a_try_out_writes_them_for_good(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
    made = write(tmp_path, {"box": BOX, "log": {"admin": frozenset({"*"})}})
    assert load(tmp_path) == made
    rules = Rules(made)
    assert rules.profile("admin").services == {"*": {"*"}}
    assert rules.profile("member").services == {"box": {"Box.*", "Box.Item.read"}}
    assert rules.profile("reader").services == {"box": {"Box.get"}}
    assert (tmp_path / ROLES_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"member": 3}', '{"member": {"services": {"B": ["*"]}}}', "[" * 10**5]
)
def test_a_damaged_file_stops_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / ROLES_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"roles\.json is damaged"):
        load(tmp_path)


def test_a_proposal_that_is_no_configuration_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no roles can be made"):
        write(tmp_path, {"box": {"member": frozenset({"box"})}})
    assert load(tmp_path) == {}


ROLES: dict[str, dict[str, Any]] = {
    "admin": {"services": {"*": ["*"]}},
    "member": {
        "services": {"box": ["Box.get"], "pubsub": ["*"]},
        "where": ['box/key=prefix:"a"'],
        "bits": {"1": {"box": ["Box.put"]}},
    },
    "b.c": {"services": {"pubsub": ["*"]}},
}


def test_what_to_write_gives_what_was_proposed_and_keeps_the_rest() -> None:
    text = how_to_accept(ROLES, "box", {**BOX, "admin": frozenset({"*"})}, every=False)
    written = tomllib.loads(text)["plugins"]["auth_evm"]["roles"]
    assert set(written) == {"member", "reader"}
    assert written["reader"] == {"services": {"box": ["Box.get"]}}
    assert written["member"] == {
        **ROLES["member"],
        "services": {"box": ["Box.*", "Box.Item.read", "Box.get"], "pubsub": ["*"]},
    }
    again = how_to_accept({**ROLES, **written}, "box", BOX, every=False)
    assert again == "# The roles have all that box proposes.\n"


def test_what_to_write_where_nothing_is_configured_has_every_role() -> None:
    text = how_to_accept(ROLES, "box", BOX, every=True)
    written = tomllib.loads(text)["plugins"]["auth_evm"]["roles"]
    assert set(written) == {"admin", "member", "reader", "b.c"}
    assert written["admin"] == ROLES["admin"]
    Rules(written)
