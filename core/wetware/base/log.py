"""Events, not prose: `log.info("grant.revoked", grant=id, by=principal)` over stdlib logging.

Never pass a key, a proof, a passphrase or a payload as a field.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
import time
from typing import Literal

_ROOT = "wetware"
# A program that sets nothing up, as a command, would have the bare names of warnings on its stderr.
logging.getLogger(_ROOT).addHandler(logging.NullHandler())


class EventLogger:
    """A logger whose message is an event name and whose data are fields."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")

    def _emit(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            exc_info = fields.pop("exc_info", None)
            self._logger.log(level, event, extra={"ww": fields}, exc_info=exc_info)  # type: ignore[arg-type]  # stdlib takes True or an exception

    def debug(self, event: str, **fields: object) -> None:
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log something an operator may have to look at."""
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log a failure. `exc_info=True` or an exception adds a traceback."""
        self._emit(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log a failure with the traceback of the exception that is being handled."""
        self._emit(logging.ERROR, event, {"exc_info": True, **fields})


def get_logger(name: str) -> EventLogger:
    """The logger `wetware.<name>`."""
    return EventLogger(name)


def _text(value: object) -> str:
    """One line, whatever the value holds: a peer must not be able to forge a log line."""
    raw = str(value)
    return raw if raw and raw.isprintable() and not set(raw) & set(' "=') else json.dumps(raw)


class TextFormatter(logging.Formatter):
    """`20:15:03.123 info  grant.revoked grant=7f3a by=local:12D3…`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record on one line, plus a traceback where there is one."""
        fields: dict[str, object] = getattr(record, "ww", {})
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        event = record.getMessage() if hasattr(record, "ww") else _text(record.getMessage())
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower():7} {event}"
        line += "".join(f" {key}={_text(value)}" for key, value in fields.items())
        if record.exc_info:
            # Indented, so that no line of it can pass for an event.
            line += "\n" + textwrap.indent(self.formatException(record.exc_info), "    ")
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record as a JSON object."""
        data: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **{key: str(value) for key, value in getattr(record, "ww", {}).items()},
        }
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data)


def setup(level: str = "info", fmt: Literal["text", "json"] = "text") -> None:
    """Send wetware's events to stderr. Called by the command line, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(level.upper())
