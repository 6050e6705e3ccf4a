"""A stream of the link under an RPC connection: what `wetware.rpc` calls a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from wetware.overlay.link.yamux import Stream
    from wetware.rpc.transport import RpcTransport


class RpcPipe:
    """For `rpc.connect` and `rpc.serve`, which own the stream then. Pausing shuts its window."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._transport: RpcTransport | None = None
        self._paused = False
        self._owed = 0  # bytes taken while paused, to be credited when reading goes on

    @property
    def peer(self) -> str:
        """Where the bytes come from, for the log."""
        return str(self._stream.connection.remote)

    def start(self, transport: RpcTransport) -> None:
        self._transport = transport
        self._stream.attach(self._on_data, self._on_end, transport.writable)

    def _on_data(self, data: bytes | bytearray | memoryview) -> None:
        assert self._transport is not None  # noqa: S101  # set by start
        self._owed += len(data)
        self._transport.feed(data)
        if not self._paused:
            self._credit()

    def _credit(self) -> None:
        owed, self._owed = self._owed, 0
        if owed:
            self._stream.consumed(owed)

    def _on_end(self, error: Exception | None) -> None:
        assert self._transport is not None  # noqa: S101  # set by start
        if error is None:
            self._transport.feed_eof()
        else:
            self._transport.feed_error(error)

    def write(self, pieces: Collection[memoryview]) -> int:
        """Hand over what the stream's buffer and window take."""
        taken = 0
        for piece in pieces:
            count = self._stream.write_nowait(piece)
            taken += count
            if count < len(piece):
                break
        return taken

    def flush(self) -> None:
        """Send what was taken; `writable` may be called from in here."""
        self._stream.connection.flush()

    def pause(self) -> None:
        """Give no window back: what is on its way still comes, at most one window."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._credit()

    def close(self) -> None:
        """Close our side after what was written; the rest of the peer's is not wanted."""
        self._stream.detach()
        self._stream.close()

    def abort(self) -> None:
        self._stream.detach()
        self._stream.reset()
