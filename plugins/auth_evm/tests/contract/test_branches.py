"""Every conditional jump of the code that ships is taken both ways by `test_contract.py`.

Measured on the bytecode, not on the source: each JUMPI that executes is recorded with the way it
went, in the constructor and at run time. So what the compiler added (argument checks, overflow
checks) counts too. What no input can reach is listed, with the reason, and must stay unreached.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from plugins.auth_evm.contracts.build import compile_source

from . import test_contract
from .chains import ARTIFACT, CONTRACTS, INSTALL, Acl, EvmChain
from .people import OWNER

CREATION = bytes.fromhex(ARTIFACT["bytecode"][2:])
RUNTIME = CREATION[-ARTIFACT["runtimeBytes"] :]

# The code there, and the way never taken → how often, and why no input can take it.
UNREACHABLE: dict[tuple[str, bool], tuple[int, str]] = {
    ("roles[i]", False): (4, "the loop's condition is the bounds check"),
    ("items[i]", False): (1, "the loop's condition is the bounds check"),
    ("if _1 { revert(0, 0) }", False): (
        1,
        "an item is within the calldata: the array's length was checked",
    ),
    ("if or(gt(newFreePtr, 0xffffffffffffffff), lt(newFreePtr, memPtr))", False): (
        1,
        "100 items do not fill 2^64 bytes of memory",
    ),
    ("if eq(value_1, 0xffff) { panic_error_0x11() }", False): (1, "keys < MAX_KEYS was checked"),
    ("if gt(x, sum) { panic_error_0x11() }", False): (1, "block.timestamp has 64 bits"),
    ("if eq(value_1, 0xffffffffffff)", False): (1, "in the constructor: seq is 0"),
}


def jumps(code: bytes) -> list[int]:
    """The places of the JUMPIs, skipping what is pushed."""
    places, pc = [], 0
    while pc < len(code):
        if code[pc] == 0x57:
            places.append(pc)
        pc += 1 + max(0, code[pc] - 0x5F) if 0x60 <= code[pc] <= 0x7F else 1
    return places


def scenarios() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each test of test_contract.py with each of its parameters."""
    for name, test in vars(test_contract).items():
        if not name.startswith("test_"):
            continue
        sets: list[dict[str, Any]] = [{}]
        for mark in getattr(test, "pytestmark", []):
            assert mark.name == "parametrize"
            names, values = mark.args
            sets = [{**given, names: value} for given in sets for value in values]
        assert next(iter(inspect.signature(test).parameters)) == "acl"
        for given in sets:
            yield name, test, given


def source_at(code: bytes, part: dict[str, Any]) -> dict[int, str]:
    """Of each instruction's place, the first line of the source that it comes from."""
    sources = {0: (CONTRACTS / "WetwareACL.sol").read_bytes()}
    sources |= {item["id"]: item["contents"].encode() for item in part["generatedSources"]}
    where: dict[int, str] = {}
    fields, pc = ["", "", "", "", ""], 0
    for entry in part["sourceMap"].split(";"):
        for number, value in enumerate(entry.split(":")):
            fields[number] = value or fields[number]
        start, length, file = int(fields[0]), int(fields[1]), int(fields[2])
        text = sources[file][start : start + length].decode() if file >= 0 else ""
        where[pc] = text.partition("\n")[0]
        pc += 1 + max(0, code[pc] - 0x5F) if 0x60 <= code[pc] <= 0x7F else 1
    return where


@pytest.mark.timeout(300)
def test_every_branch_is_taken_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    if not (CONTRACTS / "node_modules/solc").is_dir():
        pytest.skip(f"the compiler is not installed; run: {INSTALL}")
    taken: dict[bytes, Counter[tuple[int, bool]]] = {}

    def watch(code: bytes, pc: int, way: bool) -> None:
        taken.setdefault(code, Counter())[pc, way] += 1

    runs = 0
    for _, test, given in scenarios():
        test(Acl.deploy(EvmChain(watch), OWNER), **given)
        runs += 1

    _, output = compile_source()
    assert bytes.fromhex(output["evm"]["deployedBytecode"]["object"]) == RUNTIME
    # Creation code runs with the constructor's argument behind it, of any value.
    created: Counter[tuple[int, bool]] = Counter()
    for code, ways in taken.items():
        if code.startswith(CREATION):
            created += ways
    missing: Counter[tuple[str, bool]] = Counter()
    total = 0
    for code, ways, part in (
        (RUNTIME, taken[RUNTIME], output["evm"]["deployedBytecode"]),
        (CREATION[: -len(RUNTIME)], created, output["evm"]["bytecode"]),
    ):
        where = source_at(code, part)
        for pc in jumps(code):
            total += 2
            missing.update((where[pc], way) for way in (True, False) if not ways[pc, way])
    assert missing == {place: count for place, (count, _) in UNREACHABLE.items()}
    with capsys.disabled():
        print(  # noqa: T201  # what was measured is part of the result
            f"\n{runs} scenarios; of {total} ways of {total // 2} conditional jumps"
            f" {total - missing.total()} taken, {missing.total()} that no input can take"
        )
