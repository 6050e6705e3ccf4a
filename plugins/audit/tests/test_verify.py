"""Each way to tamper with a log is found, in the file and at the record where it was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wetware.errors import InvalidArgument, NotFound
from wetware_audit.chain import (
    CHECKPOINTS_FILE,
    Checkpoint,
    continues,
    encode,
    files,
    proof,
    read_checkpoints,
    split,
)
from wetware_audit.verify import PROBLEMS_MAX, Report, verify

from .parts import KEY, OTHER, open_log, signer, write

pytestmark = pytest.mark.anyio

RECORDS = 60


@pytest.fixture
async def kept(tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A closed log of several files, and a checkpoint of its end that was kept elsewhere."""
    directory = tmp_path / "audit"
    log = open_log(directory, file_bytes_max=4096)
    await write(log, RECORDS)
    while len(files(directory)[-1].read_bytes().splitlines()) < 10:
        await write(log, 1)
    checkpoint = log.checkpoint()
    log.close()
    assert len(files(directory)) >= 3
    assert verify(directory, node=KEY.peer_id, checkpoints=[checkpoint]).ok
    return directory, checkpoint


def problems(report: Report) -> str:
    assert not report.ok
    return "; ".join(f"{p.file} {p.seq} {p.what}" for p in report.problems)


def middle(directory: Path) -> Path:
    return files(directory)[1]


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def seq_in(line: bytes) -> int:
    return int(json.loads(line)["seq"])


def drop_own_checkpoints(directory: Path) -> None:
    """Whoever tampers with the log has no reason to leave them."""
    (directory / CHECKPOINTS_FILE).unlink()


Kept = tuple[Path, Checkpoint]


async def test_a_whole_log(kept: Kept) -> None:
    directory, checkpoint = kept
    report = verify(directory, node=KEY.peer_id, checkpoints=[checkpoint])
    assert report.ok
    assert report.first == 1
    assert report.records == report.last == checkpoint.seq
    assert report.checkpoints >= 1
    assert report.node == str(KEY.peer_id)


async def test_any_flipped_bit_is_found(kept: Kept) -> None:
    directory, _ = kept
    path = middle(directory)
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        report = verify(directory)
        assert not report.ok, at
        assert any(path.name == p.file for p in report.problems), at
    path.write_bytes(whole)
    assert verify(directory).ok


async def test_a_changed_field_is_found_at_its_record(kept: Kept) -> None:
    directory, _ = kept
    path = middle(directory)
    lines = path.read_bytes().splitlines()
    target = seq_in(lines[5])
    edit(path, lambda rows: [*rows[:5], rows[5].replace(b"granted", b"refused"), *rows[6:]])
    report = verify(directory)
    assert [(p.file, p.seq) for p in report.problems] == [(path.name, target)]


async def test_a_dropped_record_is_found(kept: Kept) -> None:
    directory, _ = kept
    path = middle(directory)
    after = seq_in(path.read_bytes().splitlines()[6])
    edit(path, lambda rows: [*rows[:5], *rows[6:]])
    assert f"{path.name} {after} the hashes do not fit" in problems(verify(directory))


async def test_reordered_records_are_found(kept: Kept) -> None:
    directory, _ = kept
    path = middle(directory)
    edit(path, lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]])
    assert "the hashes do not fit" in problems(verify(directory))


async def test_a_duplicated_record_is_found(kept: Kept) -> None:
    directory, _ = kept
    edit(middle(directory), lambda rows: [*rows[:6], rows[5], *rows[6:]])
    assert "the hashes do not fit" in problems(verify(directory))


async def test_an_inserted_record_is_found(kept: Kept) -> None:
    """With a hash that is right in its place: what follows does not fit."""
    directory, _ = kept

    def insert(rows: list[bytes]) -> list[bytes]:
        before = split(rows[5].rstrip(b"\n"))[1]
        forged, _ = encode({"seq": seq_in(rows[5]) + 1, "event": "login.granted"}, before)
        return [*rows[:6], forged + b"\n", *rows[6:]]

    edit(middle(directory), insert)
    assert "the hashes do not fit" in problems(verify(directory))


async def test_a_gap_in_the_numbers_is_found_though_the_hashes_fit(kept: Kept) -> None:
    directory, _ = kept
    path = files(directory)[-1]

    def renumber(rows: list[bytes]) -> list[bytes]:
        """The last record with another number, and with the hash that it has then."""
        previous = split(rows[-2].rstrip(b"\n"))[1]
        record = json.loads(rows[-1])
        del record["hash"]
        record["seq"] += 5
        return [*rows[:-1], encode(record, previous)[0] + b"\n"]

    edit(path, renumber)
    assert "follows record" in problems(verify(directory))


async def test_a_line_that_is_no_record_is_found(kept: Kept) -> None:
    directory, _ = kept
    for junk in (b"\n", b"{}\n", b"\x00" * 300 + b"\n", b"[" * 5000 + b"\n", b"x" * 20_000 + b"\n"):
        copy = directory.parent / "copy"
        shutil.copytree(directory, copy)
        path = middle(copy)

        def insert(rows: list[bytes], junk: bytes = junk) -> list[bytes]:
            return [*rows[:5], junk, *rows[5:]]

        edit(path, insert)
        assert "a line is not a record" in problems(verify(copy))
        shutil.rmtree(copy)


@pytest.mark.parametrize("which", [1, 0])
async def test_a_missing_file_is_found(kept: Kept, which: int) -> None:
    directory, checkpoint = kept
    files(directory)[which].unlink()
    for known in ([], [checkpoint]):
        report = verify(directory, checkpoints=known)
        found = problems(report)
        if which:
            assert "the file before it is missing" in found
        else:
            gone = (
                f"audit-00000001.jsonl at its beginning is gone (up to record {report.first - 1})"
            )
            assert report.first > 1
            assert f"{gone}, and no record says that the settings let it go" in found


async def test_what_the_settings_let_go_is_no_deletion(tmp_path: Path) -> None:
    log = open_log(tmp_path, file_bytes_max=4096, files_max=2)
    early = log.checkpoint()
    await write(log, RECORDS)
    log.close()
    first, *_ = files(tmp_path)
    assert first.name != "audit-00000001.jsonl"
    (tmp_path / CHECKPOINTS_FILE).unlink()
    report = verify(tmp_path, checkpoints=[early])
    assert report.ok, report.problems
    gone, about = report.notes
    assert "audit-00000001.jsonl" in gone
    assert f"(up to record {report.first - 1}) was let go by the settings" in gone
    assert "is about files that were let go" in about
    first.unlink()
    found = problems(verify(tmp_path))
    assert f"{first.name} at its beginning is gone" in found


async def test_what_was_deleted_stays_so_when_the_settings_let_go_of_nothing(
    tmp_path: Path,
) -> None:
    log = open_log(tmp_path, file_bytes_max=4096)
    await write(log, RECORDS)
    log.close()
    for path in files(tmp_path)[:2]:
        path.unlink()
    log = open_log(tmp_path, file_bytes_max=4096, files_max=100)
    await write(log, RECORDS)
    log.close()
    gone = {"first": "audit-00000001.jsonl", "last": "audit-00000002.jsonl"}
    assert log.findings == [("log.missing", gone)]
    assert "audit-00000001.jsonl to audit-00000002.jsonl" in problems(verify(tmp_path))


async def test_files_that_were_moved_up_are_found(kept: Kept) -> None:
    directory, _ = kept
    first, *rest = files(directory)
    first.unlink()
    for path, name in zip(rest, [first, *rest], strict=False):
        path.rename(name)
    assert "under another name" in problems(verify(directory))


async def test_a_damaged_log_that_was_deleted_is_found_by_the_one_after_it(kept: Kept) -> None:
    """The new one begins at record 1, so its number does not tell."""
    directory, _ = kept
    drop_own_checkpoints(directory)
    edit(files(directory)[-1], lambda rows: [*rows[:-1], b"{}\n"])
    log = open_log(directory)
    await write(log, 3)
    log.close()
    for path in files(directory)[:-1]:
        path.unlink()
    report = verify(directory)
    assert report.first == 1
    assert "no record says that the settings let it go" in problems(report)


async def test_a_log_of_an_earlier_form_is_not_taken_for_a_good_one(kept: Kept) -> None:
    directory, _ = kept
    edit(files(directory)[0], lambda rows: [rows[0].replace(b'"v":2', b'"v":1'), *rows[1:]])
    assert "it is of version 1, and this release knows 2" in problems(verify(directory))


async def test_digests_show_that_a_log_goes_on_and_nothing_else_does(kept: Kept) -> None:
    directory, last = kept
    words = {}
    for path in files(directory):
        for line in path.read_bytes().splitlines():
            words[seq_in(line)] = split(line)[1]

    def word(seq: int) -> Checkpoint:
        return Checkpoint(last.log, last.node, seq, words[seq], 0)

    for after, upto in ((1, 2), (1, last.seq), (7, 40), (last.seq - 1, last.seq)):
        found = proof(directory, last.log, after, upto)
        assert found is not None
        digests, head = found
        assert (len(digests), head) == (32 * (upto - after), words[upto])
        assert continues(word(after), word(upto), digests)
        assert not continues(word(after), word(upto), digests[:-32])
        assert not continues(word(after), word(upto), digests + digests[:32])
        assert not continues(word(after), word(upto), digests[:-1])
        assert not continues(word(after), word(upto), digests[:-1] + bytes([digests[-1] ^ 1]))
        if after > 1:
            assert not continues(word(after - 1), word(upto), digests)
    assert proof(directory, "another", 1, 5) is None
    assert proof(directory, last.log, 5, last.seq + 1) is None
    first = files(directory)[0]
    end = len(first.read_bytes().splitlines())
    first.unlink()
    assert proof(directory, last.log, end, last.seq) is not None
    assert proof(directory, last.log, end - 1, last.seq) is None


async def test_swapped_files_are_found(kept: Kept) -> None:
    directory, _ = kept
    one, two = files(directory)[1:3]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert problems(verify(directory))


async def test_an_empty_file_is_found(kept: Kept) -> None:
    directory, _ = kept
    middle(directory).write_bytes(b"")
    assert "the file is empty" in problems(verify(directory))


async def test_a_log_that_was_cut_off_is_found_with_a_checkpoint_only(kept: Kept) -> None:
    directory, checkpoint = kept
    drop_own_checkpoints(directory)
    edit(files(directory)[-1], lambda rows: rows[:-3])
    without = verify(directory)
    assert without.ok, "the chain alone cannot tell"
    assert without.checkpoints == 0
    assert "its end was cut off" in problems(verify(directory, checkpoints=[checkpoint]))


async def test_a_log_without_its_last_files_is_found_with_a_checkpoint(kept: Kept) -> None:
    directory, checkpoint = kept
    drop_own_checkpoints(directory)
    for path in files(directory)[1:]:
        path.unlink()
    assert verify(directory).ok
    assert "its end was cut off" in problems(verify(directory, checkpoints=[checkpoint]))


async def test_a_log_that_was_rewritten_is_found_with_a_checkpoint_only(kept: Kept) -> None:
    directory, checkpoint = kept
    drop_own_checkpoints(directory)
    rewrite(directory)
    assert verify(directory).ok, "every hash was computed anew"
    found = problems(verify(directory, checkpoints=[checkpoint]))
    assert "the log was rewritten" in found
    assert f" {checkpoint.seq} " in found


async def test_two_words_of_the_node_on_one_record_are_found_in_any_order(kept: Kept) -> None:
    directory, checkpoint = kept
    drop_own_checkpoints(directory)
    rewrite(directory)
    head = split(files(directory)[-1].read_bytes().splitlines()[-1])[1]
    other = Checkpoint(
        checkpoint.log, checkpoint.node, checkpoint.seq, head, checkpoint.time_ms + 1
    ).sign(signer())
    assert verify(directory, checkpoints=[other]).ok
    for both in ([checkpoint, other], [other, checkpoint]):
        assert "the log was rewritten" in problems(verify(directory, checkpoints=both))


def rewrite(directory: Path) -> None:
    """Another name in one record, and every hash from there on computed anew."""
    previous = b""
    for path in files(directory):
        out = []
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            stated = bytes.fromhex(record.pop("hash"))
            if not previous:  # the genesis
                previous = bytes.fromhex(record["prev"])
            if record["event"] == "log.opened":
                record["prev"] = previous.hex()
            if record["seq"] == 9:
                record["n"] = 999
            new, previous = encode(record, previous)
            out.append(new)
            assert record["seq"] >= 9 or stated == previous
        path.write_bytes(b"\n".join([*out, b""]))


async def test_the_checkpoints_beside_the_log_count_too(kept: Kept) -> None:
    directory, _ = kept
    edit(files(directory)[-1], lambda rows: rows[:-3])
    assert "its end was cut off" in problems(verify(directory))


async def test_a_forged_checkpoint_is_no_checkpoint(kept: Kept) -> None:
    directory, checkpoint = kept
    data = json.loads(checkpoint.text)
    for name, value in (("seq", 1), ("head", "00" * 32), ("node", str(OTHER.peer_id)), ("v", 1)):
        with pytest.raises(InvalidArgument, match="checkpoint"):
            Checkpoint.parse(json.dumps({**data, name: value}, separators=(",", ":")))
    (directory / CHECKPOINTS_FILE).write_text("{}\n")
    assert "no signed checkpoints" in problems(verify(directory))


async def test_a_checkpoint_and_a_hash_have_one_form(kept: Kept) -> None:
    directory, checkpoint = kept
    text = checkpoint.text
    assert Checkpoint.parse(f" {text}\n".encode()) == checkpoint
    head = checkpoint.head.hex()
    for other in (
        text.replace(head, head.upper()),
        text.replace(head, f" {head}"),
        text.replace('"v":2', '"v": 2'),
        text.replace('"v":2', '"v":2,"v":2'),
    ):
        with pytest.raises(InvalidArgument, match="checkpoint"):
            Checkpoint.parse(other)
    path = middle(directory)
    row = path.read_bytes().splitlines()[1]
    edit(path, lambda rows: [*rows[:1], row[:-66] + row[-66:].upper() + b"\n", *rows[2:]])
    assert "a line is not a record" in problems(verify(directory, checkpoints=[checkpoint]))


async def test_a_checkpoint_of_another_node_is_not_taken(kept: Kept, tmp_path: Path) -> None:
    directory, _ = kept
    other = open_log(tmp_path / "other", key=OTHER)
    await write(other, 3)
    foreign = other.checkpoint()
    other.close()
    assert "is of another node" in problems(verify(directory, checkpoints=[foreign]))
    found = problems(verify(tmp_path / "other", node=KEY.peer_id))
    assert f"it is the log of {OTHER.peer_id}" in found


async def test_a_log_in_the_place_of_another_is_found(kept: Kept, tmp_path: Path) -> None:
    """The same node's, but begun anew: the checkpoint is of the earlier one."""
    directory, checkpoint = kept
    shutil.rmtree(directory)
    log = open_log(directory)
    await write(log, RECORDS)
    log.close()
    assert verify(directory, node=KEY.peer_id).ok
    report = verify(directory, node=KEY.peer_id, checkpoints=[checkpoint])
    assert "is not here: another was put in its place" in problems(report)


@pytest.mark.parametrize("member", ["log", "node", "prev", "seq", "hash", "event", "time_ms"])
async def test_no_first_record_of_a_file_stops_it(kept: Kept, member: str) -> None:
    directory, _ = kept
    first = files(directory)[0]
    head = json.loads(first.read_bytes().splitlines()[0])
    for value in (None, 5, -1, True, float("inf"), [], {}, "", "\ud800", "0" * 64, 2**70):
        edit(first, lambda rows: [json.dumps({**head, member: value}).encode() + b"\n", *rows[1:]])  # noqa: B023  # called at once
        assert not verify(directory).ok


async def test_no_text_stops_the_reading_of_checkpoints(kept: Kept, tmp_path: Path) -> None:
    _, checkpoint = kept
    good = json.loads(checkpoint.text)
    wrong = [
        json.dumps({**good, member: value}, separators=(",", ":")).encode()
        for member in good
        for value in (None, 5, -1, True, float("inf"), [], {}, "", "\ud800", "0" * 65, 2**70)
    ]
    wrong += [b"[" * 1000, b"5", b"null", b"\xff", b"NaN"]
    for text in wrong:
        with pytest.raises(InvalidArgument):
            Checkpoint.parse(text)
    file = tmp_path / "some.jsonl"
    file.write_bytes(b"\n".join([*wrong, checkpoint.text.encode()]))
    assert read_checkpoints(file) == ([checkpoint], len(wrong))


async def test_problems_are_bounded(kept: Kept) -> None:
    directory, _ = kept
    for path in files(directory):
        path.write_bytes(path.read_bytes().replace(b'"n":', b'"m":'))
    assert len(verify(directory).problems) == PROBLEMS_MAX


async def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no audit log"):
        verify(tmp_path)


async def test_progress_is_told(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_audit.verify.PROGRESS_RECORDS", 10)
    told: list[int] = []
    verify(kept[0], progress=told.append)
    assert told == list(range(10, verify(kept[0]).records + 1, 10))
