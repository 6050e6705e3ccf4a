"""Multicast DNS on sockets: the only module that knows python-zeroconf, imported when it runs.

zeroconf answers questions and says goodbye. It does not browse for us: its browser keeps a refresh
timer for every name that anybody makes up. We ask, and read the TXT records as they come by.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import cast

import anyio

# ruff: isort: off
from zeroconf import RecordUpdate, RecordUpdateListener, ServiceInfo, Zeroconf
from zeroconf import DNSOutgoing, DNSQuestion, DNSRecord, DNSText  # type: ignore[attr-defined]  # public, but not in `__all__`
from zeroconf.asyncio import AsyncZeroconf
# ruff: isort: on

from wetware_mdns.records import SERVICE, TTL_S

STOP_S_MAX = 0.8
"""For the goodbyes (three in 0.25 s) and the sockets to end; then they are closed as they are."""
START_S_MAX = 0.1
"""For a start that is no longer wanted; it takes about 1 ms."""
PACKET_RECORDS_MAX = 64
"""TXT records of one packet that are read: js-libp2p sends one for each address."""

_FLAGS_QUERY, _TYPE_PTR, _CLASS_IN = 0, 12, 1  # RFC 1035


class Lan:
    """A presence on the local network; an async context manager.

    Args:
        interfaces: Addresses of the interfaces to speak on; those that are not this machine's (a
            router's, for one) are left out. OSError if none is left.
        on_text: Called with every TXT record of the service that anybody sends, our own included.
            It must not raise.
    """

    def __init__(self, interfaces: Sequence[str], on_text: Callable[[bytes], None]) -> None:
        self._interfaces, self._on_text = list(interfaces), on_text
        self._zeroconf: AsyncZeroconf

    async def __aenter__(self) -> Lan:
        # Neighbours can cause most of what zeroconf logs, so it is for developers only.
        library = logging.getLogger("zeroconf")
        if library.level in (logging.NOTSET, logging.WARNING):  # zeroconf's own default
            library.setLevel(logging.CRITICAL)
        own = [address for address in self._interfaces if _is_own(address)]
        if not own:
            raise OSError(f"not addresses of this machine: {', '.join(self._interfaces)}")
        self._zeroconf = AsyncZeroconf(interfaces=own)
        starting = asyncio.create_task(self._zeroconf.zeroconf.async_wait_for_start())
        try:
            # Shielded: closed while it opens its sockets, zeroconf closes some of them twice.
            await asyncio.shield(starting)
            if not self._zeroconf.zeroconf.engine.senders:
                raise OSError(f"no multicast on {', '.join(own)}")  # noqa: TRY301 - the sockets end below
            listener = _Listener(self._zeroconf.zeroconf, self._on_text)
            self._zeroconf.zeroconf.async_add_listener(listener, None)
        except BaseException:
            await asyncio.wait([starting], timeout=START_S_MAX)
            starting.cancel()
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def announce(self, name: str, text: bytes, addresses: Sequence[str], port: int) -> None:
        """Announce a TXT record under `name`, three times in 0.5 s, and then answer questions.

        The SRV and A records beside it are what DNS-SD demands; their host is `name`, and not the
        name of this machine.
        """
        info = ServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port,
            properties=text,
            server=f"{name}.local.",
            parsed_addresses=list(addresses),
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )
        # The name is random: to probe whether somebody has it would cost 2 s, and let anybody
        # who claims it keep this node out.
        await (
            await self._zeroconf.async_register_service(
                info, cooperating_responders=True, strict=False
            )
        )

    def ask(self, *, first: bool) -> None:
        """Ask everybody for their records.

        The first question permits an answer to us alone (RFC 6762, 5.4). Such a question is
        answered even when another node has asked the same within the last second; zeroconf takes
        others for copies. The answers to further questions are for all to hear.
        """
        question = DNSQuestion(SERVICE, _TYPE_PTR, _CLASS_IN)
        question.unicast = first
        packet = DNSOutgoing(_FLAGS_QUERY)
        packet.add_question(question)
        self._zeroconf.zeroconf.async_send(packet)

    async def _close(self) -> None:
        zeroconf = self._zeroconf
        try:
            with anyio.move_on_after(STOP_S_MAX):
                await zeroconf.async_close()
        finally:
            zeroconf.zeroconf.engine.close()  # idempotent; for when the above was cut short


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


class _Listener(RecordUpdateListener):
    """Passes TXT records on, and empties zeroconf's cache.

    The cache holds whatever anybody sends for as long as they say: up to 10,000 records of 9 KB.
    Nothing here reads it.
    """

    def __init__(self, zeroconf: Zeroconf, on_text: Callable[[bytes], None]) -> None:
        super().__init__()
        self._zeroconf, self._on_text = zeroconf, on_text
        self._records: dict[DNSRecord, None] = {}

    def async_update_records(
        self, zc: Zeroconf, now: float, records: Sequence[RecordUpdate]
    ) -> None:
        """One packet has come, and is not in the cache yet."""
        read = 0
        for update in records:
            record = update.new
            self._records[record] = None
            if (
                isinstance(record, DNSText)
                and record.ttl > 0
                and read < PACKET_RECORDS_MAX
                and record.key.endswith(f".{SERVICE}")
            ):
                read += 1
                self._on_text(record.text)

    def async_update_records_complete(self) -> None:
        cache = self._zeroconf.cache
        # What it finds, it finds whatever the type of record, and the cache itself asks it so.
        cached = [r for r in self._records if cache.async_get_unique(cast("DNSText", r))]
        self._records.clear()
        cache.async_remove_records(cached)
