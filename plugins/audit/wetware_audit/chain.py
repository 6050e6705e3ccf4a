"""The form of the log: JSON lines, each with the hash of all before it.

A line is a JSON object whose last member is `"hash"`: SHA-256 of the previous line's hash and of
the SHA-256 of this line's bytes before that member. So a log can be read with any JSON tool, and
verified by hashing alone; and who knows one hash can be shown by the digests of the records since,
and without the records, that another one continues it. What the chain alone cannot show, that
somebody rewrote all of it or cut its end off, the signed checkpoints do.

Source: Schneier & Kelsey, "Secure Audit Logs to Support Computer Forensics" (1999); Crosby &
Wallach, "Efficient Data Structures for Tamper-Evident Logging" (2009).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from wetware.errors import InvalidArgument
from wetware.identity import PeerId, from_hex, verify

VERSION: Final = 2
"""Of the log's form and of checkpoints."""
DOMAIN: Final = b"wetware-audit:2\n"
CHECKPOINT_DOMAIN: Final = b"wetware-audit-checkpoint:2\n"
DIGEST_BYTES: Final = hashlib.sha256().digest_size
LINE_BYTES_MAX: Final = 16 << 10
CHECKPOINT_CHARS_MAX: Final = 1024
LOG_CHARS_MAX: Final = 64
OPENED: Final = "log.opened"
"""The first record of each file: which log, whose, the hash before it, the file's number, and that
of the oldest file that the settings keep."""
CHECKPOINTS_FILE: Final = "checkpoints.jsonl"
_BLOCK: Final = 1 << 16
_HASH_KEY: Final = b',"hash":"'
_TAIL_BYTES: Final = len(_HASH_KEY) + 64 + len(b'"}')
_FILE = re.compile(r"audit-(\d{8})\.jsonl")


def genesis(node: PeerId, log_id: str) -> bytes:
    return hashlib.sha256(DOMAIN + node.encode() + b"\n" + log_id.encode()).digest()


def digest(body: bytes) -> bytes:
    """What the chain has of a record."""
    return hashlib.sha256(body).digest()


def link(previous: bytes, record_digest: bytes) -> bytes:
    return hashlib.sha256(previous + record_digest).digest()


def encode(record: Mapping[str, Any], previous: bytes) -> tuple[bytes, bytes]:
    """(the line without its end, its hash). What would not fit into a line is cut, and shows it."""
    body = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()[:-1]
    while len(body) > LINE_BYTES_MAX - _TAIL_BYTES:
        record = _shorter(record)
        body = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()[:-1]
    hashed = link(previous, digest(body))
    return body + _HASH_KEY + hashed.hex().encode() + b'"}', hashed


def _shorter(record: Mapping[str, Any]) -> dict[str, Any]:
    texts = [name for name, value in record.items() if isinstance(value, str)]
    longest = max(texts, key=lambda name: len(json.dumps(record[name])))
    text = record[longest]
    return {**record, longest: f"{text[: len(text) // 2]}…"}


def split(line: bytes) -> tuple[bytes, bytes]:
    """(what is hashed, the hash that the line states); raises ValueError."""
    body, tail = line[:-_TAIL_BYTES], line[-_TAIL_BYTES:]
    if len(line) <= _TAIL_BYTES or not tail.startswith(_HASH_KEY) or not tail.endswith(b'"}'):
        raise ValueError("not a record")
    return body, from_hex(tail[len(_HASH_KEY) : -2].decode("ascii"))


def files(directory: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(path for path in directory.glob("audit-*.jsonl") if _FILE.fullmatch(path.name))


def file_name(count: int) -> str:
    return f"audit-{count:08d}.jsonl"


def number(path: Path) -> int:
    match = _FILE.fullmatch(path.name)
    return int(match[1]) if match else 0


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; a last one that lacks its end comes as it is.

    One that is longer than LINE_BYTES_MAX comes cut, so that no file can fill the memory.
    """
    with path.open("rb", buffering=1 << 20) as file:
        while line := file.readline(LINE_BYTES_MAX + 1):
            yield line[:-1] if line.endswith(b"\n") else line


def seq_of(body: bytes) -> int:
    """The number in `{"seq":N,…`, which every record begins with; 0 if it has none."""
    if not body.startswith(b'{"seq":'):
        return 0
    try:
        return int(body[7 : body.index(b",", 7)])
    except ValueError:
        return 0


def seek(file: BinaryIO, seq: int) -> None:
    """Go to where record `seq` begins, or would: a search by halves, as numbers only rise."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while low < high:
        middle = (low + high) // 2
        file.seek(max(0, middle - 1))
        if middle:
            file.readline(LINE_BYTES_MAX + 1)
        line = file.readline(LINE_BYTES_MAX + 1)
        if line and seq_of(line) < seq:
            low = file.tell()
        else:
            high = middle
    file.seek(low)


def opening(path: Path) -> dict[str, Any]:
    """The first record of a file; raises ValueError where it cannot be one."""
    record = json.loads(next(lines(path), b""))
    if type(record) is not dict or record.get("event") != OPENED or type(record["seq"]) is not int:
        raise ValueError("it does not begin with the record of its opening")
    return record


def proof(directory: Path, log: str, after: int, last: int) -> tuple[bytes, bytes] | None:
    """What shows that record `last` of a log continues record `after`.

    Returns (the digests of the records between, the last one included; the hash at `last`); None
    where not all of them are here any more. Raises ValueError where the log is damaged, OSError.
    """
    needed: list[Path] = []
    for path in reversed(files(directory)):
        begins = opening(path)
        if begins.get("log") != log:
            return None
        needed.insert(0, path)
        if begins["seq"] <= after + 1:
            break
    digests, seq, head = bytearray(), after, b""
    for path in needed:
        with path.open("rb") as file:
            seek(file, seq + 1)
            while seq < last and (line := file.readline(LINE_BYTES_MAX + 1)):
                body, head = split(line.removesuffix(b"\n"))
                if seq_of(body) != seq + 1:
                    return None
                digests += digest(body)
                seq += 1
    return (bytes(digests), head) if seq == last > after else None


def continues(old: Checkpoint, new: Checkpoint, digests: bytes) -> bool:
    """Whether these digests, all of them, lead from one checkpoint to the other."""
    head = old.head
    for at in range(0, len(digests), DIGEST_BYTES):
        head = link(head, digests[at : at + DIGEST_BYTES])
    count, rest = divmod(len(digests), DIGEST_BYTES)
    return not rest and count == new.seq - old.seq and head == new.head and old.log == new.log


def backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first; a last one without its end is left out."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        rest, first = b"", True
        while at:
            size = min(_BLOCK, at)
            at -= size
            file.seek(at)
            *found, last = (file.read(size) + rest).split(b"\n")
            if first:
                first, last = False, found.pop() if found else b""
            if found:
                yield last
                yield from reversed(found[1:])
                rest = found[0]
            else:
                rest = last
        if rest:
            yield rest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A node's signed word on what its log was.

    Attributes:
        log: The log's ID.
        node: Whose log.
        seq: Number of the last record.
        head: Its hash.
        time_ms: When it was signed, Unix ms.
        signature: The node's.
    """

    log: str
    node: PeerId
    seq: int
    head: bytes
    time_ms: int
    signature: bytes = b""

    def _fields(self) -> dict[str, Any]:
        return {
            "v": VERSION,
            "log": self.log,
            "node": str(self.node),
            "seq": self.seq,
            "head": self.head.hex(),
            "time_ms": self.time_ms,
        }

    def _signed_bytes(self) -> bytes:
        return json.dumps(self._fields(), separators=(",", ":"), sort_keys=True).encode()

    def sign(self, sign: Callable[[bytes], bytes]) -> Checkpoint:
        """The same with the node's signature, which `sign` makes in CHECKPOINT_DOMAIN."""
        signature = sign(self._signed_bytes())
        return Checkpoint(self.log, self.node, self.seq, self.head, self.time_ms, signature)

    @property
    def text(self) -> str:
        fields = {**self._fields(), "signature": self.signature.hex()}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str | bytes) -> Checkpoint:
        """The inverse of `text`, its signature checked; raises InvalidArgument."""
        try:
            found = cls._parse(text)
        except (ValueError, TypeError, KeyError, RecursionError, InvalidArgument) as exc:
            raise InvalidArgument(
                f"not a checkpoint: {str(exc)[:120]}",
                hint="`ww audit checkpoint` prints one",
                code="invalid.checkpoint",
            ) from None
        public = found.node.public_key
        if public is None or not verify(
            public, found.signature, CHECKPOINT_DOMAIN + found._signed_bytes()
        ):
            raise InvalidArgument(
                f"the checkpoint is not signed by {found.node}",
                hint="take one that `ww audit checkpoint` printed, unchanged",
                code="invalid.checkpoint",
            )
        return found

    @classmethod
    def _parse(cls, text: str | bytes) -> Checkpoint:
        """Unsigned yet; raises ValueError and what comes of a wrong type."""
        if len(text) > CHECKPOINT_CHARS_MAX:
            raise ValueError("too long")
        value = json.loads(text)
        keys = {"v", "log", "node", "seq", "head", "time_ms", "signature"}
        if type(value) is not dict or value.keys() != keys or value["v"] != VERSION:
            raise ValueError("of a form that this release does not know")
        if not all(type(value[name]) is str for name in ("log", "node", "head", "signature")):
            raise ValueError("a field of a wrong type")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (value["seq"], value["time_ms"])):
            raise ValueError("a number is out of range")
        if len(value["log"]) > LOG_CHARS_MAX:
            raise ValueError("the log's ID is too long")
        head = from_hex(value["head"])
        if len(head) != hashlib.sha256().digest_size:
            raise ValueError("its hash has a wrong length")
        found = cls(
            log=value["log"],
            node=PeerId.parse(value["node"]),
            seq=value["seq"],
            head=head,
            time_ms=value["time_ms"],
            signature=from_hex(value["signature"]),
        )
        if found.text != (text if isinstance(text, str) else text.decode()).strip():
            raise ValueError("not as it was printed")  # one checkpoint has one text
        return found


def read_checkpoints(path: Path, last: int | None = None) -> tuple[list[Checkpoint], int]:
    """(the good ones of a file, or among its last lines; how many lines are bad)."""
    good, bad = [], 0
    if path.exists():
        for line in lines(path) if last is None else islice(backwards(path), last):
            try:
                good.append(Checkpoint.parse(line))
            except InvalidArgument:
                bad += 1
    return good, bad
