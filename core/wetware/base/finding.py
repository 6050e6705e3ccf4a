"""A finding, and how a check becomes some."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from wetware.base.log import get_logger
from wetware.errors import WetwareError

log = get_logger("doctor")

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at.
        level: "ok", "warning" or "error".
        text: What was found.
        remedy: What to do about it, with the next command; "" if it is fine.
    """

    check: str
    level: str
    text: str
    remedy: str = ""


def level(text: str) -> Level:
    """A level as another node names it; an unknown one is a warning."""
    for known in get_args(Level):
        if text == known:
            return cast("Level", known)
    return "warning"


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """It works, and somebody should look at it."""
    return Finding(check, "warning", text, remedy)


def error(check: str, text: str, remedy: str) -> Finding:
    """Something does not work because of it."""
    return Finding(check, "error", text, remedy)


def counted(number: int, thing: str) -> str:
    """A number and what it is of."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def remedy_of(hint: str, command: str) -> str:
    """A hint as a remedy: with a command in it, or `command` after it."""
    if "`" in hint:
        return hint
    return f"{hint}; then `{command}`" if hint else f"`{command}`"


def of_error(check: str, exc: WetwareError, command: str = "ww doctor") -> Finding:
    """An error of ours as a finding: its hint, and the command that shows more."""
    return error(check, exc.message, remedy_of(exc.hint, command))


def span(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def size(count: float) -> str:
    """A number of bytes in its largest unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


Check = Callable[[], Awaitable[Iterable[Finding]] | Iterable[Finding]]


async def judged(name: str, check: Check, limit_s: float) -> list[Finding]:
    """The findings of a check; one that fails or hangs is a finding itself."""
    import asyncio  # every command imports this module
    import inspect

    try:
        async with asyncio.timeout(limit_s):
            found = check()
            return list(await found if inspect.isawaitable(found) else found)
    except TimeoutError:
        return [
            warning(
                name,
                f"could not be judged within {limit_s:g} s",
                "the machine or the node is overloaded; `ww doctor` again, and `ww status`",
            )
        ]
    except WetwareError as exc:
        return [of_error(name, exc)]
    except Exception as exc:
        log.debug("check.failed", check=name, exc_info=exc)
        text = " ".join(str(exc).split())[:200]
        return [
            warning(
                name,
                f"could not be judged: {type(exc).__name__}{': ' if text else ''}{text}",
                "`ww --debug doctor`, and report what it prints",
            )
        ]
