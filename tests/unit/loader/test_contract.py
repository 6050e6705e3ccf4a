"""Every hook is documented and called, and so is what plugins are made of."""

from __future__ import annotations

import re
from pathlib import Path

from wetware import testing
from wetware.client.installed import CLIENT_GROUP, SIGNER_GROUP
from wetware.loader.judge import HOOKS

ROOT = Path(__file__).parents[3]


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
