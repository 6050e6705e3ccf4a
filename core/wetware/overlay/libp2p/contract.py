"""What the overlay promises: its limits, its errors and what its verbs return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wetware.errors import OverlayError

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId

State = Literal["starting", "running", "restarting", "stopped"]


class OverlayUnavailable(OverlayError):
    """The libp2p guest is starting, restarting or stopped; links and streams are not affected."""

    code = "overlay.unavailable"


class OverlayTimeout(OverlayError):
    """The network did not answer in time."""

    code = "overlay.timeout"


@dataclass(frozen=True, slots=True)
class OverlayLimits:
    """Every limit of the control plane.

    Attributes:
        start_s: For one start of the guest, import included; a guest that hangs is replaced.
        stop_s: For the guest to end when it is told to.
        wait_s: How long a peer's stream waits for a guest that is away.
        restart_s_min: Wait before the second restart in a row; the first one is immediate.
        restart_s_max: The wait doubles up to here.
        healthy_s: A guest that ran this long is no longer "in a row" with the crash before.
        identify_s: For one identify exchange, ours or a peer's.
        identify_bytes: Of an identify message; js-libp2p's own are below 2 KiB.
        identify_streams_max: Identify exchanges that we run at a time.
        dht_s: For one DHT verb; a lookup of many rounds takes seconds.
        dht_key_bytes_max: Of a DHT key: what other implementations accept for provider records.
        dht_stream_s: Life of an inbound DHT stream; libp2p serves 12 at a time and never ends them.
        dht_streams_per_peer_max: Inbound DHT streams of one peer.
        dht_provider_keys_max: Keys with provider records that we keep for others (~1 KiB each).
        dht_value_bytes_max: Of a value record that we keep for others (IPNS's own limit).
        guest_streams_max: Streams of one connection that wait for the guest to accept them.
        calls_max: Verbs under way; further ones are refused.
        dials_max: Dials by libp2p at a time.
        dial_s: For one dial by libp2p.
        dial_addrs_max: Addresses that are tried per peer; a peer announces as many as it likes.
        peers_max: Unconnected peers whose addresses are remembered.
        peers_sweep_s: Interval between sweeps of the remembered peers.
        adoptions_max: Times that libp2p may let go of a live connection before it is not offered
            again.
    """

    start_s: float = 60.0
    stop_s: float = 0.8
    wait_s: float = 10.0
    restart_s_min: float = 0.1
    restart_s_max: float = 30.0
    healthy_s: float = 60.0
    identify_s: float = 10.0
    identify_bytes: int = 64 << 10
    identify_streams_max: int = 64
    dht_s: float = 30.0
    dht_key_bytes_max: int = 80
    dht_stream_s: float = 60.0
    dht_streams_per_peer_max: int = 4
    dht_provider_keys_max: int = 20_000
    dht_value_bytes_max: int = 10 << 10
    guest_streams_max: int = 64
    calls_max: int = 64
    dials_max: int = 16
    dial_s: float = 10.0
    dial_addrs_max: int = 16
    peers_max: int = 1000
    peers_sweep_s: float = 60.0
    adoptions_max: int = 3


@dataclass(frozen=True, slots=True)
class OverlayStatus:
    """What the libp2p guest is doing.

    Attributes:
        state: "running" is the only state in which the verbs work.
        restarts: Times that the guest was started again after it had failed.
        last_error: Why it ended the last time, one line, or None.
        dht_peers: Peers in the DHT's routing table.
    """

    state: State
    restarts: int
    last_error: str | None
    dht_peers: int


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that provides a key.

    Attributes:
        peer: The provider.
        addrs: Its addresses that wetware can dial, with the peer ID.
    """

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
