"""The verbs of the store as messages of etcd, and what etcd answers to them."""

from __future__ import annotations

from typing import Any, Final

from wetware_sync.charges import Room
from wetware_sync.engine import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Operation,
    Order,
    Outcome,
    Page,
    Put,
    Txn,
)
from wetware_sync.etcd.layout import DATA, end_of, item_of, wrap
from wetware_sync.etcd.wire import pb

_NUMBER_MAX: Final = (1 << 63) - 1
_TARGETS: Final = {"version": "VERSION", "create_revision": "CREATE", "mod_revision": "MOD"}


def range_of(get: Get, *, limit: int, revision: int = 0) -> Any:
    """Etcd's RangeRequest; `revision`: as it was then."""
    key = DATA + get.key
    terms: dict[str, Any] = {"key": key, "revision": revision, "limit": limit}
    if get.prefix:
        terms["range_end"] = end_of(key)
    if get.after and get.after >= get.key:
        terms["key"] = DATA + get.after + b"\0"
    if get.created_before:
        terms["max_create_revision"] = get.created_before - 1
        if get.created_before == 1:  # for which etcd would take 0 as no bound
            terms["min_create_revision"] = _NUMBER_MAX
    if get.order is not Order.KEY:
        oldest = get.order is Order.OLDEST
        terms["sort_target"] = pb.RangeRequest.CREATE
        terms["sort_order"] = pb.RangeRequest.ASCEND if oldest else pb.RangeRequest.DESCEND
    return pb.RangeRequest(**terms)


def request_of(txn: Txn, owner: str) -> Any:
    """Etcd's TxnRequest. It has no comparison of a value: those have headers there."""
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in txn.compares],
        success=[_operation(each, owner) for each in txn.then],
        failure=[_operation(each, owner) for each in txn.otherwise],
    )


def _compare(compare: Compare) -> Any:
    number = compare.operand
    assert isinstance(number, int)  # noqa: S101  # those of values are decided before
    return pb.Compare(
        key=DATA + compare.key,
        target=getattr(pb.Compare, _TARGETS[compare.target]),
        result=pb.Compare.EQUAL,
        **{compare.target: min(number, _NUMBER_MAX)},
    )


def _operation(operation: Operation, owner: str) -> Any:
    key = DATA + operation.key
    match operation:
        case Put():
            value = wrap(owner, operation.value)
            put = pb.PutRequest(key=key, value=value, lease=operation.lease)
            return pb.RequestOp(request_put=put)
        case Delete():
            end = end_of(key) if operation.prefix else b""
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key, range_end=end))
        case Get():
            return pb.RequestOp(request_range=range_of(operation, limit=operation.limit))


def outcome_of(reply: Any, revision: int, txn: Txn) -> tuple[Outcome, bool]:
    """Of etcd's TxnResponse, and whether it has written anything."""
    room, results, wrote = Room(), list[Page | int](), False
    branch = txn.then if reply.succeeded else txn.otherwise
    for operation, answer in zip(branch, reply.responses, strict=True):
        if isinstance(operation, Get):
            found = answer.response_range
            items = room.take(map(item_of, found.kvs))
            results.append(Page(tuple(items), revision, found.more or len(items) < len(found.kvs)))
        else:
            put = isinstance(operation, Put)
            many = 1 if put else answer.response_delete_range.deleted
            wrote = wrote or many > 0
            results.append(many)
    return Outcome(reply.succeeded, revision, tuple(results)), wrote


def holds(compare: Compare, row: KeyValue | None) -> bool:
    """Whether a comparison is true where the key is this."""
    if compare.target == "value":
        return row is not None and row.value == compare.operand
    return bool((getattr(row, compare.target) if row else 0) == compare.operand)
