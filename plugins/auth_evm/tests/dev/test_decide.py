"""Try-out or not: every combination of what was said and what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from wetware.base.log import get_logger
from wetware.errors import ConfigError
from wetware.hookspecs import Overlay, PluginContext
from wetware_auth_evm.dev.tryout import REQUIRED, decide
from wetware_auth_evm.node.config import AuthEvmConfig

ADDRESS = "0x" + "11" * 20
COMPLETE: dict[str, Any] = {
    "chain_id": 1,
    "contract": ADDRESS,
    "endpoints": ("https://a.example", "https://b.example", "https://c.example"),
}
FOUNDED = b"wetware-evm/1\0 and so on"


@dataclass(frozen=True)
class Case:
    """What was said, what is there, and what has to come of it.

    `says`: True or False is the decision; a list is what the refusal has to contain.
    """

    says: bool | list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    dev: bool = False
    founding: bytes | None = None
    joined: bool = False
    files: tuple[str, ...] = ()


TRY = ("dev.json", "dev/chain.sqlite")
CASES = {
    # Nothing said, nothing there: the two ways to begin.
    "fresh": Case(True),
    "fresh, dev": Case(True, dev=True),
    # A try-out that was begun goes on, whatever stopped it half way.
    "begun": Case(True, founding=FOUNDED, files=TRY),
    "begun, dev": Case(True, dev=True, founding=FOUNDED, files=TRY),
    "begun, no cluster yet": Case(True, files=TRY),
    "begun, nothing written yet": Case(True, files=("dev/lock",)),
    # Settings that say nothing about the chain are welcome with --dev, and a part without.
    "dev, roles": Case(True, {"roles": {"a": {"services": {"pubsub": ["*"]}}}}, dev=True),
    "dev, scope": Case(True, {"scope": "default"}, dev=True),
    "roles alone": Case(
        ["not complete", "sets roles", "not chain_id, contract, endpoints", "--dev"],
        {"roles": {"a": {"services": {"pubsub": ["*"]}}}},
    ),
    "a default, written down": Case(
        ["not complete", "sets scope", "not chain_id, contract, endpoints"], {"scope": "default"}
    ),
    # A part of what is needed.
    **{
        f"without {name}": Case(
            ["not complete", f"and not {name}", "ww auth evm deploy"],
            {key: value for key, value in COMPLETE.items() if key != name},
        )
        for name in REQUIRED
    },
    **{
        f"{name} alone": Case(["not complete", f"sets {name}", "--dev"], {name: COMPLETE[name]})
        for name in REQUIRED
    },
    # The real one.
    "complete": Case(False, COMPLETE),
    "complete, founded": Case(False, COMPLETE, founding=FOUNDED, files=("replica.json",)),
    "joined, endpoints": Case(False, {"endpoints": COMPLETE["endpoints"]}, joined=True),
    "joined, nothing said": Case(False, joined=True, founding=FOUNDED),  # `resolve` asks for more
    # Both said at once.
    "dev, complete": Case(["--dev makes a chain", "chain_id, contract, endpoints"], COMPLETE, True),
    **{
        f"dev, {name}": Case(["--dev makes a chain", f"sets {name}"], {name: value}, True)
        for name, value in {
            **COMPLETE,
            "genesis_hash": "0x" + "22" * 32,
            "deployed_at": 3,
            "quorum": 1,
            "finality": "finalized",
        }.items()
    },
    # A real cluster was here before.
    "founded, nothing said": Case(
        ["not configured", "founded or joined before", "set [plugins.auth_evm] chain_id"],
        founding=FOUNDED,
    ),
    "replica, nothing said": Case(["not configured", "replica.json"], files=("replica.json",)),
    "events, nothing said": Case(["not configured", "events.log"], files=("events.log",)),
    "founded, dev": Case(["--dev, and", "before", "--data-dir"], dev=True, founding=FOUNDED),
    "replica, dev": Case(["--dev, and", "replica.json"], dev=True, files=("replica.json",)),
    "joined, dev": Case(["joined a cluster", "--data-dir"], dev=True, joined=True),
    # A try-out was here before, and now something real is said.
    "begun, complete": Case(["that of a try-out", "--data-dir"], COMPLETE, files=TRY),
    "begun, scope": Case(["that of a try-out", "sets scope"], {"scope": "x"}, files=TRY),
    "begun, joined": Case(["that of a try-out", "joined"], joined=True, files=TRY),
}


@pytest.mark.parametrize("name", CASES)
def test_the_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for file in case.files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    before = sorted(tmp_path.rglob("*"))
    ctx = PluginContext(
        name="auth_evm",
        config=AuthEvmConfig(**case.settings),
        log=get_logger("test"),
        data_dir=tmp_path,
        clock=cast("Any", None),
        overlay=cast("Overlay", None),
        join_document=b"{}" if case.joined else None,
        founding=case.founding,
        configured=frozenset(case.settings),
        dev=case.dev,
    )
    if isinstance(case.says, bool):
        assert decide(ctx) is case.says
    else:
        with pytest.raises(ConfigError) as caught:
            decide(ctx)
        text = f"{caught.value.message} | {caught.value.hint}"
        for part in case.says:
            assert part in text, text
        assert caught.value.exit_code == 78
        assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before, "deciding writes nothing"
