"""The public tests of WASI preview 1, on the driver: python run_wasi_testsuite.py CHECKOUT [WORD].

CHECKOUT is the branch prod/testsuite-base of https://github.com/WebAssembly/wasi-testsuite, which
has them compiled. WORD selects those with it in their names. Exits with 1 where one fails.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from wetware_proc.driver import Limits, Spec
from wetware_proc.wasm.driver import WasmDriver, wasm_driver


def expected(module: Path) -> dict[str, Any]:
    """A test, and what the file beside it says of it."""
    found: dict[str, Any] = {"args": [], "env": {}, "root": None, "exit_code": 0}
    found["code"] = module.read_bytes()
    beside = module.with_suffix(".json")
    return found | (json.loads(beside.read_text()) if beside.exists() else {})


async def failure(driver: WasmDriver, module: Path, scratch: Path) -> str:
    """What is wrong with a test's run; "" where nothing is."""
    wanted, out, err = expected(module), bytearray(), bytearray()
    dirs = {}
    if wanted["root"]:
        shutil.copytree(module.parent / wanted["root"], scratch / "root")
        dirs["/"] = (scratch / "root", True)
    spec = Spec(
        args=(module.name, *wanted["args"]),
        env=wanted["env"],
        dirs=dirs,
        # Some tests take the first descriptors for free, or make thousands of files.
        limits=Limits(wall_s=60.0, memory_bytes=256 << 20, tmp_files=5000 if dirs else 0),
        stdout=out.extend,
        stderr=err.extend,
    )
    image = await driver.load(wanted["code"])
    end = await image.run(spec)
    if (end.kind, end.code) != ("exited", wanted["exit_code"]):
        return f"{end}\n{err.decode(errors='replace')[-500:]}"
    for name, written in (("stdout", out), ("stderr", err)):
        if name in wanted and written.decode() != wanted[name]:
            return f"{name} {bytes(written[:80])!r}, and not {wanted[name]!r}"
    return ""


async def main(modules: list[Path]) -> int:
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as data:
        async with wasm_driver(Path(data) / "driver") as driver:
            for module in modules:
                language = module.parts[-4]
                with tempfile.TemporaryDirectory() as scratch:
                    wrong = await failure(driver, module, Path(scratch))
                (failed if wrong else passed)[language] += 1
                if wrong:
                    sys.stdout.write(f"FAILED {language}/{module.name}: {wrong}\n")
    for language in sorted(passed | failed):
        count = passed[language] + failed[language]
        sys.stdout.write(f"{language}: {passed[language]} of {count}\n")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    found = Path(sys.argv[1]).glob("tests/*/testsuite/wasm32-wasip1/*.wasm")
    word = "".join(sys.argv[2:3])
    sys.exit(asyncio.run(main(sorted(each for each in found if word in each.name))))
