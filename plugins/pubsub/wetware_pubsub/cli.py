"""`ww pub`, `ww sub` and `ww request`, through the client library."""

from __future__ import annotations

import base64
import json as json_module
import os
import stat
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import examples, note, run_client
from wetware.cli.streams import output_failed
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware_pubsub.client import Message, Messages
    from wetware_pubsub.requesting import Answer

LINE_BYTES_MAX = 1 << 20
"""A line of standard input; the node has its own, lower limit."""
MESSAGE_BYTES_MAX = 1 << 20
"""Of --file; the node has its own, lower limit."""
_READ_BYTES = 64 << 10
_CHUNKS_MAX = 4  # read ahead of what the node took
_PIPE_BYTES = 4096  # a pipe that poll calls writable takes so much without blocking


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    section = "Services"
    shown = examples(
        "ww pub chat hello",
        "ww sub status | ww pub copies -",
        "ww pub faces --file cat.png",
        "ww pub load x --count 1000 --rate 100",
    )
    app.command("pub", rich_help_panel=section, epilog=shown)(pub_command)
    shown = examples("ww sub chat", "ww sub 'logs.>' --json", "ww sub chat --node zone=cloud")
    app.command("sub", rich_help_panel=section, epilog=shown)(sub_command)
    shown = examples("ww request sum '1 2'", "ww request who '' --count 10 --timeout 1 --json")
    app.command("request", rich_help_panel=section, epilog=shown)(request_command)


Foreign = Annotated[
    bool,
    typer.Option(
        "--foreign", help="The raw topic of that name, for peers of other implementations."
    ),
]
Topic = Annotated[str, typer.Argument(help="The topic's name.", show_default=False)]
Pattern = Annotated[
    str,
    typer.Argument(
        help="The topic's name; with * for any token between dots, > for the rest, a pattern.",
        metavar="TOPIC",
        show_default=False,
    ),
]


def pub_command(
    topic: Topic,
    message: Annotated[
        str | None,
        typer.Argument(
            help="The message; '-' or nothing: one message a line from standard input.",
            metavar="[MESSAGE]",
            parser=str,  # it may be empty
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", help="The message is what is in this file, as it is.", dir_okay=False
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Publish the message so many times.")
    ] = 1,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, help="Messages in a second, at most.")
    ] = None,
    foreign: Foreign = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print how many were published, as a JSON object.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr how many were published.")
    ] = False,
) -> None:
    """Publish to a topic."""
    if file is not None and message is not None:
        raise InvalidArgument("a message and --file exclude each other")
    lines = file is None and message in (None, "-")
    if lines and count != 1:
        raise InvalidArgument(
            "--count is of one message, and standard input has one a line",
            hint="give the message, or --file",
        )

    async def work(session: Session) -> int:
        source = stdin_lines() if lines else _again(message, file, count)
        return await publish(session, topic, paced(source, rate), raw=foreign)

    published = run_client(work)
    if json:
        typer.echo(json_module.dumps({"topic": topic, "published": published}))
    elif not published:
        note("nothing was published: standard input is empty")
    elif verbose:
        note(f"published {published} message{'s' * (published != 1)} to {topic}")


def sub_command(
    topic: Pattern,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Stop after so many messages.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print the data alone: no newline, nothing escaped.")
    ] = False,
    foreign: Foreign = False,
    buffer: Annotated[
        int, typer.Option("--buffer", min=0, help="Messages that may wait at the node.")
    ] = 0,
    slow: Annotated[
        str,
        typer.Option("--slow", help="Beyond them: dropOldest, dropNewest, disconnect or block."),
    ] = "dropOldest",
) -> None:
    """Print what is published to a topic, one line a message, until interrupted."""
    if json and raw:
        raise InvalidArgument("--json and --raw exclude each other")
    plain = terminal_line if sys.stdout.isatty() else text_line
    as_line = json_line if json else bytes_of if raw else plain

    async def work(session: Session) -> None:
        joined = await session.pubsub.join(topic, raw=foreign)
        messages = joined.subscribe(buffer=buffer, slow=slow)
        await subscribe(messages, Output(sys.stdout.fileno()), as_line, count)

    run_client(work, reconnect=True)


def request_command(
    topic: Topic,
    data: Annotated[str, typer.Argument(help="The request.", show_default=False, parser=str)],
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds to wait for answers.")
    ] = 5.0,
    count: Annotated[
        int,
        typer.Option(
            "--count", "-n", min=1, help="Answers: one responder is asked for 1, all for more."
        ),
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Ask who serves a topic, and print each answer on a line."""
    as_line = json_answer if json else terminal_line if sys.stdout.isatty() else text_line

    async def work(session: Session) -> None:
        joined = await session.pubsub.join(topic)
        output = Output(sys.stdout.fileno())
        if count == 1:
            await output.write(as_line(await joined.request(data, timeout_s=timeout)))
            return
        async with joined.request_many(data, count=count, timeout_s=timeout) as answers:
            async for answer in answers:
                await output.write(as_line(answer))

    run_client(work)


# --- publishing -----------------------------------------------------------------------------------


async def publish(
    session: Session,
    topic: str,
    source: AsyncIterable[bytes | str] | Iterable[bytes | str],
    *,
    raw: bool = False,
) -> int:
    """Publish everything from `source`; returns how many messages."""
    return await (await session.pubsub.join(topic, raw=raw)).publish_all(source)


async def _again(message: str | None, file: Path | None, count: int) -> AsyncIterator[bytes]:
    if file is None:
        data = (message or "").encode()
    else:
        try:
            with file.open("rb") as opened:
                data = opened.read(MESSAGE_BYTES_MAX + 1)
        except OSError as exc:
            raise InvalidArgument(f"cannot read {file}: {exc.strerror}") from exc
        if len(data) > MESSAGE_BYTES_MAX:
            raise InvalidArgument(
                f"{file} has more than {MESSAGE_BYTES_MAX} bytes, which no message has",
                hint="`ww blob put FILE`, and publish the CID",
            )
    for _ in range(count):
        yield data


async def paced(source: AsyncIterable[bytes], rate: float | None) -> AsyncIterator[bytes]:
    """At most `rate` of them in a second, and none saved up; None: as they come."""
    import asyncio

    due, loop = 0.0, asyncio.get_running_loop()
    async for data in source:
        if rate is not None:
            now = loop.time()
            if due > now:
                await asyncio.sleep(due - now)
            due = max(due, now) + 1 / rate
        yield data


async def stdin_lines(fd: int = 0) -> AsyncIterator[bytes]:
    """The lines of a file descriptor, without their ends; reads ahead a little.

    Reads in a daemon thread: a regular file cannot be polled, and one that blocks must not delay
    the end of the process. Raises InvalidArgument for a line above LINE_BYTES_MAX.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()
    room = threading.Semaphore(_CHUNKS_MAX)
    over = threading.Event()

    def read() -> None:
        while True:
            room.acquire()
            if over.is_set():
                return
            chunk: bytes | OSError
            try:
                chunk = os.read(fd, _READ_BYTES)
            except OSError as exc:
                chunk = exc
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # the loop is closed: nobody reads any more
                return
            if not chunk or isinstance(chunk, OSError):
                return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    rest = b""
    try:
        while True:
            chunk = await chunks.get()
            room.release()
            if isinstance(chunk, OSError):
                raise InvalidArgument(f"cannot read standard input: {chunk.strerror}") from chunk
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line
            if len(rest) > LINE_BYTES_MAX:
                raise InvalidArgument(
                    f"a line of standard input is longer than {LINE_BYTES_MAX} bytes",
                    hint="publish it in parts",
                )
        if rest:
            yield rest
    finally:
        over.set()
        room.release()


# --- subscribing ----------------------------------------------------------------------------------


def bytes_of(message: Message) -> bytes:
    """The data, and nothing else."""
    return message.data


def text_line(message: Message | Answer) -> bytes:
    """The data and a newline."""
    return message.data + b"\n"


def terminal_line(message: Message | Answer) -> bytes:
    """The data, with what could control a terminal escaped, and a newline."""
    text = message.data.decode(errors="backslashreplace")
    shown = "".join(
        c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text
    )
    return shown.encode() + b"\n"


def json_line(message: Message) -> bytes:
    """One JSON object: topic, publisher, principal, seqno; data, or data_base64 for no UTF-8."""
    fields: dict[str, object] = {
        "topic": message.topic,
        "publisher": str(message.publisher),
        "principal": message.principal and str(message.principal),
        "seqno": message.seqno,
    }
    return _json(fields, message.data)


def json_answer(answer: Answer) -> bytes:
    """One JSON object: principal, node; data, or data_base64 for no UTF-8."""
    return _json({"principal": str(answer.principal), "node": str(answer.node)}, answer.data)


def _json(fields: dict[str, object], data: bytes) -> bytes:
    try:
        fields["data"] = data.decode()
    except UnicodeDecodeError:
        fields["data_base64"] = base64.b64encode(data).decode()
    return json_module.dumps(fields).encode() + b"\n"


class Output:
    """A file descriptor that is written to without blocking the loop where that is possible."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._polled = not stat.S_ISREG(os.fstat(fd).st_mode)

    async def write(self, data: bytes) -> None:
        """Write all of it; raises OutputFailed."""
        view = memoryview(data)
        while view:
            if self._polled:
                await self._writable()
            try:
                view = view[os.write(self._fd, view[:_PIPE_BYTES] if self._polled else view) :]
            except OSError as exc:
                output_failed(exc)

    async def _writable(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_writer(self._fd, ready.set)
        except PermissionError:  # /dev/null and other files that epoll refuses never block
            self._polled = False
            return
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._fd)


async def subscribe(
    subscription: Messages,
    output: Output,
    as_line: Callable[[Message], bytes],
    count: int | None = None,
) -> None:
    """Write messages as they come, until `count` of them were written."""
    written = reported = 0
    async with subscription as messages:
        async for message in messages:
            if messages.dropped != reported:
                note(f"ww: {messages.dropped - reported} messages dropped: this end is too slow")
                reported = messages.dropped
            await output.write(as_line(message))
            written += 1
            if written == count:
                return
