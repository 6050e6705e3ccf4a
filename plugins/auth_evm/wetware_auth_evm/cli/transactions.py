"""Transactions, encoded and signed.

Ours: importing eth-account takes longer than all else that sends one, and raises the limit of
recursion of the whole process. Source: the yellow paper, appendix B; EIP-155; EIP-1559.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wetware_auth_evm.chain.addresses import keccak

if TYPE_CHECKING:
    from wetware_auth_evm.login.wallets import Wallet

Item = int | bytes | Sequence["Item"]


def signed(
    wallet: Wallet,
    *,
    chain_id: int,
    nonce: int,
    to: bytes,
    data: bytes,
    gas: int,
    value: int = 0,
    price: int = 0,
    tip: int | None = None,
) -> bytes:
    """A transaction as it is sent; `keccak` of it is its hash.

    An empty `to` makes a contract. `price` is the most that a unit of gas may cost in wei, and
    `tip` what of it is the validator's; None for a chain from before EIP-1559.
    """
    call: list[Item] = [gas, to, value, data]
    if tip is None:
        fields = [nonce, price, *call]
        v, r, s = _signature(wallet, _rlp([*fields, chain_id, 0, 0]))
        return _rlp([*fields, v + 2 * chain_id + 35, r, s])
    fields = [chain_id, nonce, tip, price, *call, []]
    return b"\x02" + _rlp([*fields, *_signature(wallet, b"\x02" + _rlp(fields))])


def _signature(wallet: Wallet, text: bytes) -> tuple[int, int, int]:
    found = wallet.sign(keccak(text))
    return found[64] - 27, int.from_bytes(found[:32], "big"), int.from_bytes(found[32:64], "big")


def _rlp(item: Item) -> bytes:
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8, "big")
    if not isinstance(item, bytes):
        body = b"".join(map(_rlp, item))
        return _length(len(body), 0xC0) + body
    if len(item) == 1 and item[0] < 0x80:
        return item
    return _length(len(item), 0x80) + item


def _length(length: int, kind: int) -> bytes:
    if length < 56:
        return bytes([kind + length])
    number = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([kind + 55 + len(number)]) + number
