"""Constraints on arguments, as texts with one grammar: command line, wire and policy documents.

    [Interface.method:]param=VALUE

VALUE is one of `chat` or `equals:chat`, `in:a,b,c`, `prefix:chat/`, `glob:chat/*`,
`subject:chat.>`, `max:1024` (of a number its value, of Data and Text the bytes, of a list the
items) and `range:1..10`. Only the parameters that the service's schema annotates with
`$Ww.constrained` or `$Ww.name` can be named.

See docs/reference/constraints.md.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.base import subjects
from wetware.base.names import snake
from wetware.broker.glob import VALUE_CHARS_MAX, glob
from wetware.broker.methods import ANY, is_service
from wetware.broker.values import parse_size
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.rpc import Method

WHERE_CHARS_MAX: Final = 1024
WHERE_MAX: Final = 64
"""Constraints of one grant."""
VALUES_MAX: Final = 256
"""Alternatives of one `in:`."""
KINDS: Final = ("equals", "in", "prefix", "glob", "max", "range", "subject")

_WHERE = re.compile(r"(?:([A-Za-z][\w.]*\.[A-Za-z]\w*):)?([A-Za-z]\w*)=(.*)", re.DOTALL | re.ASCII)
_KIND = re.compile(r"([a-z]+):(.*)", re.DOTALL)
_HEX: Final = "hex:"
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)

Passes = Callable[[Mapping[str, object]], bool]
"""A test of a method's arguments."""


def bad_where(what: str, hint: str = "") -> InvalidArgument:
    hint = hint or "write PARAMETER=VALUE, e.g. topic=chat, topic=glob:chat/*, data=max:1024"
    return InvalidArgument(what, hint=hint, code="invalid.where")


@dataclass(frozen=True, slots=True)
class Where:
    """One constraint on one parameter.

    Attributes:
        service: Name of the service, or "*".
        method: "Interface.method", or "" for every method that has the parameter.
        param: The parameter, in snake_case.
        kind: One of KINDS.
        values: What it is compared with, as texts; numbers in their shortest form.
    """

    service: str
    method: str
    param: str
    kind: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, service: str = ANY) -> Where:
        """See the module; raises InvalidArgument "invalid.where"."""
        if not is_service(service):
            raise bad_where(f"{service[:80]!r} is not a service's name", '"*" is every service')
        _check_length(text)
        if not text.isprintable():
            raise bad_where(f"{text[:80]!r} has control characters", "write Data as hex:…")
        match = _WHERE.fullmatch(text)
        if match is None:
            raise bad_where(f"{text[:80]!r} is not a constraint")
        method, param, value = match[1] or "", snake(match[2]), match[3]
        if method:
            interface, _, name = method.rpartition(".")
            method = f"{interface}.{snake(name)}"
        found = _KIND.fullmatch(value)
        if found is not None and found[1] in KINDS:
            kind, value = found[1], found[2]
        elif set(value) & set("*?["):
            raise bad_where(
                f"{text[:80]!r} has a wildcard",
                f"write {param}=glob:{value[:40]} to match by it, or {param}=equals:{value[:40]}",
            )
        elif found is not None and not value.startswith(_HEX):
            # It may be meant as a kind that a later release knows, or be misspelt.
            raise bad_where(
                f"{text[:80]!r}: there is no kind {found[1][:40]!r} of constraints",
                f"kinds are {', '.join(KINDS)}; for the text itself {param}=equals:{value[:40]}",
            )
        else:
            kind = "equals"
        where = cls(service, method, param, kind, _values(kind, value, text))
        _check_length(where.text)  # it is kept in this form, and read again
        return where

    @classmethod
    def parse_option(cls, text: str, services: Collection[str]) -> Where:
        """As it is typed: `[SERVICE/]CONSTRAINT`.

        Where there is one service only it need not be named. Raises InvalidArgument.
        """
        service, slash, rest = text.partition("/")
        if slash and is_service(service):
            return cls.parse(rest, service)
        if len(services) != 1:
            cls.parse(text)
            raise bad_where(
                f"{text[:80]!r}: of which service?",
                f"write SERVICE/{text[:80]}, SERVICE of: {', '.join(sorted(services)) or 'none'}",
            )
        return cls.parse(text, next(iter(services)))

    @property
    def text(self) -> str:
        """What `parse` reads, without the service."""
        where = f"{self.method}:" if self.method else ""
        if self.kind == "in":
            escaped = (v.replace("\\", "\\\\").replace(",", "\\,") for v in self.values)
            value = ",".join(escaped)
        else:
            value = "..".join(self.values)
        prefix = f"{self.kind}:"
        plain = value.startswith(_HEX) or not _KIND.fullmatch(value)
        if self.kind == "equals" and plain and not set(value) & set("*?["):
            prefix = ""
        return f"{where}{self.param}={prefix}{value}"

    def applies(self, method: Method) -> bool:
        """Whether it is about this method.

        A constraint without a method is about every method that has the parameter, annotated or
        not: one that lost its annotation must not become free. One with a method is about those who
        inherit it, too: what a service returns may be an heir of what its schema says.
        """
        if self.method:
            interface, _, name = self.method.rpartition(".")
            return name == method.name and interface in method.interface.lineage
        return self.param in method.params

    def compile(self, method: Method) -> Passes | None:
        """The test for a method's arguments; None where it cannot be judged: a denial."""
        if self.param not in method.constrainable:
            return None
        param = self.param
        passes = _test(self.kind, self.values, method.param_kinds.get(param, "other"))
        return None if passes is None else lambda args: passes(args.get(param))


def _check_length(text: str) -> None:
    if len(text) > WHERE_CHARS_MAX:
        raise bad_where(f"a constraint of {len(text)} characters; {WHERE_CHARS_MAX} are allowed")


def _values(kind: str, value: str, text: str) -> tuple[str, ...]:
    match kind:
        case "in":
            values = _alternatives(value)
            if not 1 <= len(values) <= VALUES_MAX or not all(values):
                raise bad_where(
                    f"{text[:80]!r} needs 1 to {VALUES_MAX} values, none of them empty",
                    "write e.g. topic=in:a,b; a comma in a value is \\,",
                )
            return tuple(values)
        case "range":
            low, dots, high = value.partition("..")
            least, most = _amount(low), _amount(high)
            if not dots or least is None or most is None:
                raise bad_where(f"{text[:80]!r} is not a range", "write e.g. count=range:1..10")
            if least > most:
                raise bad_where(f"{text[:80]!r} allows nothing", f"write range:{high}..{low}")
            return str(least), str(most)
        case "max":
            if (number := _amount(value)) is None:
                raise bad_where(
                    f"{text[:80]!r} has no number", "write e.g. data=max:1024, data=max:64k"
                )
            return (str(number),)
        case "prefix" if not value:
            # Such as an unset variable of a shell leaves.
            raise bad_where(f"{text[:80]!r} allows everything", "leave it out, or write glob:*")
        case "glob" if "[" in value:
            raise bad_where(
                f"{text[:80]!r}: a glob knows * and ? alone",
                "write in:a,b for several names, prefix: or equals: for a bracket",
            )
        case "subject" if subjects.tokens_of(value) is None:
            raise bad_where(
                f"{text[:80]!r}: `*` is a whole token between dots, and `>` the last one",
                "write e.g. topic=subject:orders.*.new, topic=subject:orders.>",
            )
    return (value,)


def _alternatives(value: str) -> list[str]:
    """The values between commas; a backslash takes what follows as it is. [] if none does."""
    try:
        return next(csv.reader([value], quoting=csv.QUOTE_NONE, escapechar="\\", strict=True))
    except csv.Error:
        return []


def _amount(text: str) -> int | float | None:
    """A number or a size; None if it is neither."""
    if (number := _number(text)) is not None:
        return number
    try:
        return parse_size(text)
    except InvalidArgument:
        return None


def _number(text: str) -> int | float | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    if match[1] is None and match[2] is None:
        return int(text)
    value = float(text)
    return value if math.isfinite(value) else None


# --- values of a parameter's type -----------------------------------------------------------------


def typed(text: str, method: Method, param: str) -> object:
    """A text as a value of a method's parameter; raises InvalidArgument."""
    value = _scalar(text, method.param_kinds.get(param, "other"))
    if value is None:
        kind = method.param_kinds.get(param)
        what = f"{text[:40]!r} is not {kind}" if kind else f"it has no parameter {param[:40]!r}"
        raise InvalidArgument(
            f"{method.where}: {what}",
            hint=f"it takes {', '.join(method.params) or 'nothing'}",
            code="invalid.argument",
        )
    return value


def _scalar(text: str, of: str) -> str | bytes | float | None:
    """A text as a value of the parameter's type; None if it is none."""
    match of:
        case "text" | "enum" | "subject":
            return text
        case "data" if text.startswith(_HEX):
            try:
                return bytes.fromhex(text[len(_HEX) :])
            except ValueError:
                return None
        case "data":
            return text.encode()
        case "int":
            number = _number(text)
            return number if type(number) is int else None
        case "float":
            number = _number(text)
            return None if number is None else float(number)
        case "bool":
            return {"true": True, "false": False}.get(text)
        case _:
            return None


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _itself(value: float) -> float:
    return value


_MEASURED: Final[Mapping[str, tuple[type, Callable[[Any], float]]]] = {
    "int": (int, _itself),
    "float": (float, _itself),
    "data": (bytes, len),
    "list": (list, len),
    "text": (str, _utf8_bytes),
}
"""What `max` and `range` compare of a value."""


def _test_subject(kind: str, texts: tuple[str, ...]) -> Callable[[Any], bool] | None:
    """As `_test`: a pattern passes where it is certain that every name which it matches does."""
    if kind == "subject":
        pattern = subjects.tokens_of(texts[0])

        def covered(value: object) -> bool:
            if pattern is None or type(value) is not str or len(value) > VALUE_CHARS_MAX:
                return False
            tokens = subjects.tokens_of(value)
            return tokens is not None and subjects.covers(pattern, tokens)

        return covered
    if kind == "glob":
        return glob(texts[0], wild=subjects.ONE + subjects.REST)
    if kind in ("equals", "in") and any(subjects.literal(text) != text for text in texts):
        return None  # a pattern among names: `subject` is meant
    passes = _test(kind, texts, "text")
    if passes is None:
        return None
    if kind == "prefix":
        return lambda value: type(value) is str and passes(subjects.literal(value))
    return lambda value: type(value) is str and subjects.literal(value) == value and passes(value)


def _test(kind: str, texts: tuple[str, ...], of: str) -> Callable[[Any], bool] | None:
    """A test that never raises, whatever it is given; None for a kind that does not fit the type.

    A value that is not exactly of the type fails: True is no number, and nothing has `__eq__`s of
    its own.
    """
    if of == "subject":
        return _test_subject(kind, texts)
    wanted = [_scalar(text, of) for text in texts]
    first = wanted[0]
    cls = type(first)
    match kind:
        case "equals" | "in" if None not in wanted:
            allowed = frozenset(wanted)
            return lambda value: type(value) is cls and value in allowed
        case "prefix" if of == "text":
            return lambda value: type(value) is str and value.startswith(texts[0])
        case "prefix" if isinstance(first, bytes):
            start = first
            return lambda value: type(value) is bytes and value.startswith(start)
        case "glob" if of in ("text", "enum"):
            return glob(texts[0])
        case "max" | "range" if of in _MEASURED:
            cls, measure = _MEASURED[of]
            low = _number(texts[0]) if kind == "range" else -math.inf
            high = _number(texts[-1])
            if low is None or high is None:
                return None
            least, most = low, high
            return lambda value: type(value) is cls and least <= measure(value) <= most
        case _:
            return None


def kinds_for(of: str) -> tuple[str, ...]:
    """The kinds of constraints that a parameter's type takes."""
    samples = {"range": ("0", "1"), "max": ("1",)}
    word = {"bool": "true", "int": "1", "float": "1"}.get(of, "x")
    return tuple(kind for kind in KINDS if _test(kind, samples.get(kind, (word,)), of) is not None)
