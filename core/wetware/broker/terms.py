"""What a grant adds to its parent's: fewer methods, constraints on arguments, rate, quotas, an end.

Constraints are texts with one grammar everywhere: the command line, the wire, policy documents.

    [Interface.method:]param=VALUE

VALUE is one of `chat` or `equals:chat`, `in:a,b,c`, `prefix:chat/`, `glob:chat/*`, `max:1024` (of a
number its value, of Data and Text the bytes, of a list the items) and `range:1..10`. Only the
parameters that the service's schema annotates with `$Ww.constrained` or `$Ww.name` can be named.

See docs/reference/constraints.md.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.broker.fences import Fence
    from wetware.rpc import Interface, Method

ANY: Final = "*"
WHERE_CHARS_MAX: Final = 1024
WHERE_MAX: Final = 64
"""Constraints of one grant."""
VALUES_MAX: Final = 256
"""Alternatives of one `in:`."""
GLOB_VALUE_CHARS_MAX: Final = 4096
"""A longer value matches no glob: names are shorter, and a call must not hold the loop up."""
RATE_MAX: Final = 1e6
RATE_MIN: Final = 1e-9
"""Once in thirty years; a rate that is less is a mistake."""
QUOTA_MAX: Final = 2**63 - 1
TIME_MAX: Final = 253_402_300_799
"""Unix time, s, of the last moment that has a date."""
SERVICES_MAX: Final = 64
PATTERNS_MAX: Final = 256
PATTERN_CHARS_MAX: Final = 256
TERMS_CHARS_MAX: Final = 4096
"""Of all constraints of a grant that a holder makes, so that `grants_max` of them fit in memory."""

KINDS: Final = ("equals", "in", "prefix", "glob", "max", "range")
_WHERE = re.compile(r"(?:([A-Za-z][\w.]*\.[A-Za-z]\w*):)?([A-Za-z]\w*)=(.*)", re.DOTALL | re.ASCII)
_KIND = re.compile(r"([a-z]+):(.*)", re.DOTALL)
_HEX: Final = "hex:"
_SERVICE = re.compile(r"\*|[a-z]\w{0,63}", re.ASCII)
_PATTERN = re.compile(r"\*|[A-Za-z][\w.]*\.(?:\*|[A-Za-z]\w*)", re.ASCII)
_RATE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)/(s|m|h|d)(?::(\d{1,30}(?:\.\d{1,30})?))?", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AMOUNT = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*(s|m|h|d|w)", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([kKMGT])(i?))?B?", re.ASCII)
_HINT = "write PARAMETER=VALUE, e.g. topic=chat, topic=glob:chat/*, data=max:1024"

Test = Callable[[Mapping[str, object]], bool]


def _bad(what: str, hint: str = _HINT, code: str = "invalid.where") -> InvalidArgument:
    return InvalidArgument(what, hint=hint, code=code)


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h`, `7d`, `2w`; raises InvalidArgument."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or not 0 < (seconds := float(match[1]) * _SECONDS[match[2]]) < 1e10:
        raise _bad(
            f"{text[:40]!r} is not a duration", "write e.g. 90s, 10m, 1h, 7d", "invalid.duration"
        )
    return seconds


def parse_size(text: str) -> int:
    """Bytes of `1024`, `10k`, `1M`, `1MiB`; raises InvalidArgument."""
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        power = " kMGT".index((match[2] or " ").replace("K", "k"))
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
        if 0 < size <= QUOTA_MAX:
            return size
    raise _bad(f"{text[:40]!r} is not a size", "write e.g. 4096, 10k, 1MiB", "invalid.size")


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket.

    Attributes:
        per_s: Calls per second, sustained.
        burst: Calls that can be saved up.
    """

    per_s: float
    burst: float

    def __post_init__(self) -> None:
        if not (RATE_MIN <= self.per_s <= RATE_MAX and 1 <= self.burst <= RATE_MAX):
            raise _bad(
                f"a rate of {self.per_s:g} a second with a burst of {self.burst:g}",
                f"up to {RATE_MAX:.0f} a second, with a burst of 1 to {RATE_MAX:.0f}",
                "invalid.rate",
            )

    @classmethod
    def parse(cls, text: str) -> Rate:
        """From `10/s`, `100/m`, `5/h` or `10/s:20` with a burst; raises InvalidArgument."""
        match = _RATE.fullmatch(text.strip())
        if match is None:
            raise _bad(
                f"{text[:40]!r} is not a rate",
                "write e.g. 10/s, 100/m, or 10/s:20 with a burst of 20",
                "invalid.rate",
            )
        per_s = float(match[1]) / _SECONDS[match[2]]
        return cls(per_s, float(match[3]) if match[3] else _burst(per_s))

    @property
    def text(self) -> str:
        """What `parse` reads, in the smallest unit of time that gives a whole number."""
        text = f"{_decimal(self.per_s)}/s"
        for unit in "smhd":
            amount = round(self.per_s * _SECONDS[unit])
            if amount and amount / _SECONDS[unit] == self.per_s:
                text = f"{amount}/{unit}"
                break
        return text if self.burst == _burst(self.per_s) else f"{text}:{_decimal(self.burst)}"


def _burst(per_s: float) -> float:
    return float(max(1, math.ceil(per_s)))


def _decimal(value: float) -> str:
    """All digits of a float, without an exponent."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


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
        from wetware.rpc.names import snake

        if not _SERVICE.fullmatch(service):
            raise _bad(f"{service[:80]!r} is not a service's name", '"*" is every service')
        if len(text) > WHERE_CHARS_MAX:
            raise _bad(f"a constraint of {len(text)} characters; {WHERE_CHARS_MAX} are allowed")
        if not text.isprintable():
            raise _bad(f"{text[:80]!r} has control characters", "write Data as hex:…")
        match = _WHERE.fullmatch(text)
        if match is None:
            raise _bad(f"{text[:80]!r} is not a constraint")
        method, param, value = match[1] or "", snake(match[2]), match[3]
        if method:
            interface, _, name = method.rpartition(".")
            method = f"{interface}.{snake(name)}"
        found = _KIND.fullmatch(value)
        if found is not None and found[1] in KINDS:
            kind, value = found[1], found[2]
        elif set(value) & set("*?["):
            raise _bad(
                f"{text[:80]!r} has a wildcard",
                f"write {param}=glob:{value[:40]} to match by it, or {param}=equals:{value[:40]}",
            )
        elif found is not None and not value.startswith(_HEX):
            # It may be meant as a kind that a later release knows, or be misspelt.
            raise _bad(
                f"{text[:80]!r}: there is no kind {found[1][:40]!r} of constraints",
                f"kinds are {', '.join(KINDS)}; for the text itself {param}=equals:{value[:40]}",
            )
        else:
            kind = "equals"
        where = cls(service, method, param, kind, _values(kind, value, text))
        if len(where.text) > WHERE_CHARS_MAX:  # it is kept in this form, and read again
            raise _bad(
                f"a constraint of {len(where.text)} characters; {WHERE_CHARS_MAX} are allowed"
            )
        return where

    @classmethod
    def parse_option(cls, text: str, services: Collection[str]) -> Where:
        """As it is typed: `[SERVICE/]CONSTRAINT`.

        Where there is one service only it need not be named. Raises InvalidArgument.
        """
        service, slash, rest = text.partition("/")
        if slash and _SERVICE.fullmatch(service):
            return cls.parse(rest, service)
        if len(services) != 1:
            cls.parse(text)
            raise _bad(
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
            value = ("..").join(self.values)
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

    def compile(self, method: Method) -> Test | None:
        """The test for a method's arguments; None where it cannot be judged: a denial."""
        if self.param not in method.constrainable:
            return None
        test = _test(self.kind, self.values, method.param_kinds.get(self.param, "other"))
        if test is None:
            return None
        param, passes = self.param, test

        return lambda args: passes(args.get(param))


def _values(kind: str, value: str, text: str) -> tuple[str, ...]:
    match kind:
        case "in":
            values = _alternatives(value)
            if values is None or not all(values) or len(values) > VALUES_MAX:
                raise _bad(
                    f"{text[:80]!r} needs 1 to {VALUES_MAX} values, none of them empty",
                    "write e.g. topic=in:a,b; a comma in a value is \\,",
                )
            return values
        case "range":
            low, dots, high = value.partition("..")
            ends = (_shortest(low), _shortest(high))
            if not dots or ends[0] is None or ends[1] is None:
                raise _bad(f"{text[:80]!r} is not a range", "write e.g. count=range:1..10")
            if _number(ends[0]) > _number(ends[1]):  # type: ignore[operator]  # both are numbers
                raise _bad(f"{text[:80]!r} allows nothing", f"write range:{high}..{low}")
            return ends[0], ends[1]
        case "max":
            if (number := _shortest(value)) is None:
                raise _bad(f"{text[:80]!r} has no number", "write e.g. data=max:1024, data=max:64k")
            return (number,)
        case "prefix" if not value:
            # Such as an unset variable of a shell leaves.
            raise _bad(f"{text[:80]!r} allows everything", "leave it out, or write glob:*")
        case "glob" if "[" in value:
            raise _bad(
                f"{text[:80]!r}: a glob knows * and ? alone",
                "write in:a,b for several names, prefix: or equals: for a bracket",
            )
    return (value,)


def _alternatives(value: str) -> tuple[str, ...] | None:
    """The values between commas; a backslash takes what follows as it is."""
    values, escaped = [""], False
    for character in value:
        if escaped or character not in "\\,":
            values[-1] += character
            escaped = False
        elif character == ",":
            values.append("")
        else:
            escaped = True
    return None if escaped else tuple(values)


def _shortest(text: str) -> str | None:
    """A number or size in the form in which it is kept; None if it is neither."""
    number = _number(text)
    if number is None:
        try:
            number = parse_size(text)
        except InvalidArgument:
            return None
    return str(number)


def _number(text: str) -> int | float | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    if match[1] is None and match[2] is None:
        return int(text)
    value = float(text)
    return value if math.isfinite(value) else None


def _float(text: str) -> float | None:
    number = _number(text)
    return None if number is None else float(number)


def _int(text: str) -> int | None:
    number = _number(text)
    return number if type(number) is int else None


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


def _scalar(text: str, kind: str) -> object:
    """A text as a value of the parameter's type; None if it is none."""
    match kind:
        case "text" | "enum":
            return text
        case "data":
            if text.startswith(_HEX):
                try:
                    return bytes.fromhex(text[len(_HEX) :])
                except ValueError:
                    return None
            return text.encode()
        case "int":
            return _int(text)
        case "float":
            return _float(text)
        case "bool":
            return {"true": True, "false": False}.get(text)
        case _:
            return None


_TYPES: Final = {"text": str, "enum": str, "data": bytes, "int": int, "float": float, "bool": bool}


def _test(kind: str, texts: tuple[str, ...], of: str) -> Callable[[Any], bool] | None:
    """A test that never raises, whatever it is given; None for a kind that does not fit the type.

    A value that is not exactly of the type fails: True is no number, and nothing has `__eq__`s of
    its own.
    """
    if kind in ("equals", "in"):
        wanted = [_scalar(text, of) for text in texts]
        if of not in _TYPES or any(value is None for value in wanted):
            return None
        allowed, cls = frozenset(wanted), _TYPES[of]
        return lambda value: type(value) is cls and value in allowed
    if kind == "prefix":
        if of not in ("text", "data"):
            return None
        match _scalar(texts[0], of):
            case str(start):
                return lambda value: type(value) is str and value.startswith(start)
            case bytes(octets):
                return lambda value: type(value) is bytes and value.startswith(octets)
            case _:
                return None
    if kind == "glob":
        if of not in ("text", "enum"):
            return None
        return glob(texts[0])
    if kind not in ("max", "range"):
        return None
    low, high = _number(texts[0]) if kind == "range" else -math.inf, _number(texts[-1])
    return None if low is None or high is None else _between(low, high, of)


def _between(low: float, high: float, of: str) -> Callable[[Any], bool] | None:
    match of:
        case "int":
            return lambda value: type(value) is int and low <= value <= high
        case "float":
            return lambda value: type(value) is float and low <= value <= high
        case "data":
            return lambda value: type(value) is bytes and low <= len(value) <= high
        case "list":
            return lambda value: type(value) is list and low <= len(value) <= high
        case "text":
            return lambda value: type(value) is str and low <= _utf8_bytes(value) <= high
        case _:
            return None


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def glob(pattern: str) -> Callable[[object], bool]:
    """A matcher in which `*` is any characters, "/" included, and `?` is one; case counts.

    Takes time proportional to the value's length, whatever the pattern: no backtracking. What is no
    str, or has more than GLOB_VALUE_CHARS_MAX characters, does not match.
    """
    return _glob_by_bits(pattern) if "?" in pattern else _glob_by_pieces(pattern)


def _glob_by_pieces(pattern: str) -> Callable[[object], bool]:
    if "*" not in pattern:
        return lambda value: type(value) is str and value == pattern
    first, *between, last = pattern.split("*")
    pieces = tuple(piece for piece in between if piece)
    chars_min = len(first) + len(last)

    def ends(value: object) -> bool:
        return (
            type(value) is str
            and chars_min <= len(value) <= GLOB_VALUE_CHARS_MAX
            and value.startswith(first)
            and value.endswith(last)
        )

    def matches(value: object) -> bool:
        if type(value) is not str or not ends(value):
            return False
        at, end = len(first), len(value) - len(last)
        for piece in pieces:  # the leftmost place leaves the most for what follows
            at = value.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    return matches if pieces else ends


def _glob_by_bits(pattern: str) -> Callable[[object], bool]:
    """Follow all places of the pattern at once, as bits.

    Bit i is set while the first i characters, stars left out, have matched.

    Source: Baeza-Yates & Gonnet, "A New Approach to Text Searching" (1992).
    """
    characters = pattern.replace("*", "")
    loops = 0  # bits at which any character leaves the match where it is
    at = 0
    for character in pattern:
        if character == "*":
            loops |= 1 << at
        else:
            at += 1
    steps: dict[str, int] = {}
    for i, character in enumerate(characters):
        steps[character] = steps.get(character, 0) | 1 << i
    any_step, done = steps["?"], 1 << len(characters)
    steps = {character: places | any_step for character, places in steps.items()}

    def matches(value: object) -> bool:
        if type(value) is not str or len(value) > GLOB_VALUE_CHARS_MAX:
            return False
        places = 1
        for character in value:
            step = steps.get(character, any_step)
            places = ((places & step) << 1) | (places & loops)
            if not places:
                return False
        return bool(places & done)

    return matches


# --- terms ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What one grant adds; what is None or () adds nothing.

    Attributes:
        services: Service name or "*" → method patterns; None: all that the parent has.
        where: Constraints; all of them have to pass.
        expires_at: Unix time, s.
        rate: Calls per time.
        calls: Quota of calls.
        bytes: Quota of bytes: Data and Text of parameters, and messages of results and callbacks.
        fence: Token of a lock that the holder must still have.
    """

    services: Mapping[str, frozenset[str]] | None = None
    where: tuple[Where, ...] = ()
    expires_at: float | None = None
    rate: Rate | None = None
    calls: int | None = None
    bytes: int | None = None
    fence: Fence | None = None

    def __post_init__(self) -> None:
        if len(self.where) > WHERE_MAX:
            raise _bad(f"{len(self.where)} constraints; {WHERE_MAX} are allowed")
        for what, value in (("calls", self.calls), ("bytes", self.bytes)):
            if value is not None and not (type(value) is int and 0 < value <= QUOTA_MAX):
                raise _bad(f"a quota of {value} {what}", "leave it out for none", "invalid.quota")
        end = self.expires_at
        if end is not None and not (type(end) in (int, float) and 0 <= end <= TIME_MAX):
            raise _bad("an end that is no time", "write e.g. 1h", "invalid.duration")

    def plain(self) -> dict[str, Any]:
        value: dict[str, Any] = {"v": 1}
        if self.services is not None:
            value["services"] = {
                name: sorted(patterns) for name, patterns in sorted(self.services.items())
            }
        if self.where:
            value["where"] = [[where.service, where.text] for where in self.where]
        if self.expires_at is not None:
            value["expires_at"] = self.expires_at
        if self.rate is not None:
            value["rate"] = [self.rate.per_s, self.rate.burst]
        if self.calls is not None:
            value["calls"] = self.calls
        if self.bytes is not None:
            value["bytes"] = self.bytes
        if self.fence is not None:
            value["fence"] = self.fence.encode().hex()
        return value

    @classmethod
    def from_plain(cls, value: object) -> Terms:
        """The inverse of `plain`; raises InvalidArgument on anything that it does not know."""
        from wetware.broker.fences import Fence

        known = {"v", "services", "where", "expires_at", "rate", "calls", "bytes", "fence"}
        if not isinstance(value, Mapping) or value.get("v") != 1 or value.keys() - known:
            raise _bad("terms of a version that this release does not know", "update this node")
        try:
            services, rate, fence = value.get("services"), value.get("rate"), value.get("fence")
            return cls(
                services=None if services is None else patterns_of(services),
                where=tuple(Where.parse(text, name) for name, text in value.get("where", ())),
                expires_at=value.get("expires_at"),
                rate=None if rate is None else Rate(*map(float, rate)),
                calls=value.get("calls"),
                bytes=value.get("bytes"),
                fence=None if fence is None else Fence.decode(bytes.fromhex(fence)),
            )
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as exc:
            raise _bad(f"malformed terms: {exc}", "update this node") from None

    def describe(self) -> list[str]:
        """For people, a line for each term."""
        lines = []
        for name, patterns in sorted((self.services or {}).items()):
            if name == "session":
                if "Session.*" not in patterns and "Session.share" not in patterns:
                    lines.append("not to be passed on")
                continue
            lines.append(f"{name} {', '.join(sorted(patterns))}" if patterns else f"{name} nothing")
        for where in self.where:
            prefix = "" if where.service == ANY else f"{where.service} "
            lines.append(f"{prefix}{where.text}")
        if self.rate is not None:
            lines.append(f"at most {self.rate.text}")
        if self.calls is not None:
            lines.append(f"{self.calls} calls in all")
        if self.bytes is not None:
            lines.append(f"{self.bytes} bytes in all")
        if self.expires_at is not None:
            end = datetime.datetime.fromtimestamp(self.expires_at, datetime.UTC)
            lines.append(f"until {end:%Y-%m-%d %H:%M:%S} UTC")
        if self.fence is not None:
            lines.append(self.fence.describe())
        return lines


def patterns_of(services: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    """Service → method patterns, with method names in snake_case; raises InvalidArgument."""
    from wetware.rpc.names import snake

    if len(services) > SERVICES_MAX:
        raise _bad(f"{len(services)} services; {SERVICES_MAX} are allowed", code="invalid.methods")
    out = {}
    for name, patterns in services.items():
        if not _SERVICE.fullmatch(name):
            raise _bad(f"{name[:80]!r} is not a service's name", "", "invalid.methods")
        if isinstance(patterns, str):  # its letters would be taken for patterns
            raise _bad(f"{name}: methods are a list", "", "invalid.methods")
        clean = set()
        for pattern in patterns:
            if isinstance(pattern, str) and len(pattern) > PATTERN_CHARS_MAX:
                raise _bad(
                    f"a method of {len(pattern)} characters; {PATTERN_CHARS_MAX} are allowed",
                    "",
                    "invalid.methods",
                )
            if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
                raise _bad(
                    f"{str(pattern)[:80]!r} is not a method",
                    'write "*", "Interface.*" or "Interface.method"',
                    "invalid.methods",
                )
            interface, dot, method = pattern.rpartition(".")
            clean.add(f"{interface}.{snake(method)}" if dot and method != ANY else pattern)
        if len(clean) > PATTERNS_MAX:
            raise _bad(f"{len(clean)} methods; {PATTERNS_MAX} are allowed", code="invalid.methods")
        out[name] = frozenset(clean)
    return out


# --- against a schema -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Constrainable:
    """A parameter that grants can constrain.

    Attributes:
        method: The method.
        param: The parameter.
        kind: "text", "data", "int", "float", "bool", "enum", "list".
        named: It is held to NAME in `ww share SERVICE:NAME`.
    """

    method: Method
    param: str
    kind: str
    named: bool


def constrainable(interface: Interface) -> list[Constrainable]:
    """The parameters that can be constrained, of an interface and those that it leads to."""
    naming = interface.naming
    return [
        Constrainable(method, param, method.param_kinds[param], naming == param)
        for reached in interface.reachable()
        for method in reached.methods.values()
        for param in method.params
        if param in method.constrainable
    ]


def binds(where: Where, interface: Interface) -> bool:
    """Whether a constraint is about any method of a service.

    One that is about none, e.g. because a release of the service renamed a parameter, must not let
    everything pass: whoever enforces it denies the service then.
    """
    return any(
        where.applies(method)
        for reached in interface.reachable()
        for method in reached.methods.values()
    )


def check_against(
    terms: Terms, service: str, interface: Interface, patterns: frozenset[str]
) -> None:
    """Raise InvalidArgument for a constraint that binds nothing or cannot be judged.

    Args:
        terms: What is to be granted.
        service: Of this service; constraints of others are not looked at.
        interface: The service's.
        patterns: The methods that are granted.
    """
    from wetware.broker.grants import matches

    found = constrainable(interface)
    granted = [
        item for item in found if matches(patterns, item.method.interface.name, item.method.name)
    ]
    for where in terms.where:
        if where.service not in (ANY, service):
            continue
        about = [
            item for item in granted if item.param == where.param and where.applies(item.method)
        ]
        if not about:
            if granted:
                hint = f"these can: {_listed(granted)}"
            elif found:
                hint = f"with their methods these can: {_listed(found)}"
            else:
                hint = f"nothing of {service} can be constrained"
            raise _bad(
                f"{where.text!r} names no parameter that can be constrained, of what is granted of "
                f"{service}",
                hint,
            )
        for item in about:
            if where.compile(item.method) is None:
                raise _bad(
                    f"{where.text!r} does not fit {item.method.where}, where {where.param} is "
                    f"{item.kind}",
                    f"{item.kind} takes {', '.join(kinds_for(item.kind)) or 'no constraint'}",
                )


def kinds_for(kind: str) -> tuple[str, ...]:
    """The kinds of constraints that a parameter's type takes."""
    samples = {"range": ("0", "1"), "max": ("1",)}
    word = {"bool": "true", "int": "1", "float": "1"}.get(kind, "x")
    return tuple(k for k in KINDS if _test(k, samples.get(k, (word,)), kind) is not None)


def _listed(found: list[Constrainable]) -> str:
    return ", ".join(f"{item.method.where}:{item.param} ({item.kind})" for item in found)


def one_object(
    service: str, interface: Interface, name: str, asked: frozenset[str], mine: frozenset[str]
) -> tuple[frozenset[str], Where]:
    """What `SERVICE:NAME` grants: methods, and the constraint that holds them to the object NAME.

    Of the service's own interface, and its heirs, these are the methods that take the name; of what
    those lead to, all, except where a parameter of that name cannot be constrained. So whatever the
    methods that are granted are called on, it is the object, or came from it.

    Args:
        service: Of this service.
        interface: The service's.
        name: NAME; with a `*` a glob.
        asked: Patterns: of these methods only, and of the one that gives what they are called on.
        mine: Patterns of who grants it.

    Raises InvalidArgument where there is no such object, or `asked` is beyond it.
    """
    from wetware.broker.grants import matches

    param = interface.naming
    if not name:  # such as an unset variable of a shell leaves
        raise _bad(f"{service}: names no object", f"write {service} alone for all of it")
    if param is None:
        raise _bad(
            f"{service} has no named objects", f"write --where, or {service} without :{name[:40]}"
        )
    where = Where.parse(f"{param}={'glob' if '*' in name else 'equals'}:{name}", service)

    def of_it(method: Method) -> bool:
        if not matches(mine, method.interface.name, method.name):
            return False
        if param in method.params:
            return where.compile(method) is not None
        return not method.interface.is_a(interface)

    reached = interface.reachable(of_it)
    found = [m for each in reached for m in each.methods.values() if of_it(m)]
    if not found:
        raise _bad(
            f"{where.text!r} is about nothing that you have of {service}",
            f"`ww services {service} --describe` shows what can be shared as {service}:NAME",
        )
    chosen = [m for m in found if not asked or matches(asked, m.interface.name, m.name)]
    for pattern in sorted(asked):
        if not any(matches(frozenset({pattern}), m.interface.name, m.name) for m in chosen):
            raise _bad(
                f"{pattern!r} is not about one object {param.upper()} of {service}",
                f"share it apart, without :{name[:40]}; about one are "
                f"{', '.join(m.where for m in found)}",
                "invalid.methods",
            )
    chosen += _ways(interface, chosen, found)
    return patterns_of({service: [m.where for m in chosen]})[service], where


def _ways(interface: Interface, chosen: list[Method], found: list[Method]) -> list[Method]:
    """The methods that give what `chosen` are called on, where none of `chosen` does.

    One that gives anything else is not added, and where there are several none is: which one was
    meant, only who asks knows. Raises InvalidArgument.
    """
    wanted = {method.interface for method in chosen}
    lost = wanted.difference(interface.reachable(lambda m: m in chosen))
    givers = [m for m in found if m.interface == interface and m.gives and m.gives <= wanted]
    ways = {}
    for goal in lost:
        to_it = [method for method in givers if goal in method.gives]
        if len(to_it) == 1:
            ways[to_it[0].where] = to_it[0]
    added = list(ways.values())
    lost = wanted.difference(interface.reachable(lambda m: m in chosen or m in added))
    if lost:

        def leads(method: Method) -> bool:
            to = method.interface.reachable(lambda other: other is method)
            return method.interface not in lost and not lost.isdisjoint(to)

        leading = [method.where for method in found if leads(method)]
        raise _bad(
            f"it has to be said how to get at {', '.join(sorted(i.name for i in lost))}",
            f"name one of these methods as well: {', '.join(leading)}",
            "invalid.methods",
        )
    return added
