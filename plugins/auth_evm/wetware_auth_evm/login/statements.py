"""What a wallet signs, once: that a session key may act for its account.

In two forms that say the same: EIP-712 typed data, and for wallets that show it better an EIP-4361
text. Both are bound to chain, contract, cluster and scope, and to the epochs of account and scope:
after `revokeAll` or `resetScope` the session is dead, also if the account gets new grants.

A text is read by a strict parser: it is taken only if rendering what was read gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final

from wetware.errors import InvalidArgument
from wetware.identity import PeerId
from wetware_auth_evm.chain.addresses import checksum, keccak, parse_address

SESSION_S_MAX: Final = 24 * 3600
"""How long a session lives at most."""
ROLES_MAX: Final = 16
TEXT_CHARS_MAX: Final = 4096
NONCE_BYTES: Final = 16
DOMAIN_NAME, DOMAIN_VERSION = "Wetware Session", "1"
_HALF_ORDER: Final = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0

_DOMAIN_TYPE: Final = (
    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
_FIELDS: Final = (
    ("account", "address"),
    ("sessionKey", "string"),
    ("cluster", "string"),
    ("scope", "bytes32"),
    ("roles", "string[]"),
    ("scopeEpoch", "uint48"),
    ("rootEpoch", "uint48"),
    ("accountEpoch", "uint48"),
    ("issuedAt", "uint64"),
    ("expiresAt", "uint64"),
    ("nonce", "bytes16"),
)
_STRUCT_TYPE: Final = "SessionGrant(" + ",".join(f"{kind} {name}" for name, kind in _FIELDS) + ")"
_CLUSTER = re.compile(r"[0-9a-f]{16,64}\Z")
_ROLE = re.compile(r"[A-Za-z][\w.-]{0,31}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """What is signed.

    Attributes:
        chain_id: EIP-155.
        contract: The contract that says who has which role, 20 bytes.
        account: Whose wallet signs, 20 bytes.
        session_key: Peer ID of the Ed25519 key that may act for it.
        cluster: ID of the cluster.
        scope: Of the cluster in the contract, 32 bytes.
        roles: Those that the session may use, sorted; what the contract gives beyond is not used.
        epochs: Of the scope, of ROOT, and of the account.
        issued_at: Unix s.
        expires_at: Unix s; at most SESSION_S_MAX later.
        nonce: 16 random bytes.
    """

    chain_id: int
    contract: bytes
    account: bytes
    session_key: PeerId
    cluster: str
    scope: bytes
    roles: tuple[str, ...]
    epochs: tuple[int, int, int]
    issued_at: int
    expires_at: int
    nonce: bytes

    def check(self) -> None:
        """Raise InvalidArgument for what no form can hold, or nobody should sign."""
        for field, good in (
            ("chain_id", 0 < self.chain_id < 2**53),
            ("contract", len(self.contract) == 20),
            ("account", len(self.account) == 20),
            ("session_key", self.session_key.public_key is not None),
            ("cluster", bool(_CLUSTER.match(self.cluster))),
            ("scope", len(self.scope) == 32),
            ("roles", 1 <= len(self.roles) <= ROLES_MAX and all(map(_ROLE.match, self.roles))),
            ("roles", list(self.roles) == sorted(set(self.roles))),
            ("epochs", all(0 <= epoch < 2**48 for epoch in self.epochs)),
            ("issued_at", 0 < self.issued_at < 2**40),
            ("expires_at", 0 < self.expires_at - self.issued_at <= SESSION_S_MAX),
            ("nonce", len(self.nonce) == NONCE_BYTES),
        ):
            if not good:
                raise InvalidArgument(
                    f"a session with a wrong {field.replace('_', ' ')}",
                    hint="`ww auth evm login` makes a right one",
                    code="invalid.session",
                )

    # --- EIP-712 ----------------------------------------------------------------------------------

    def digest(self) -> bytes:
        """What is signed in the form of typed data (EIP-712)."""
        domain = keccak(
            keccak(_DOMAIN_TYPE.encode())
            + keccak(DOMAIN_NAME.encode())
            + keccak(DOMAIN_VERSION.encode())
            + self.chain_id.to_bytes(32, "big")
            + self.contract.rjust(32, b"\0")
        )
        words = [
            keccak(_STRUCT_TYPE.encode()),
            self.account.rjust(32, b"\0"),
            keccak(self.session_key.encode()),
            keccak(self.cluster.encode()),
            self.scope,
            keccak(b"".join(keccak(role.encode()) for role in self.roles)),
            *(epoch.to_bytes(32, "big") for epoch in self.epochs),
            self.issued_at.to_bytes(32, "big"),
            self.expires_at.to_bytes(32, "big"),
            self.nonce.ljust(32, b"\0"),
        ]
        return keccak(b"\x19\x01" + domain + keccak(b"".join(words)))

    def typed_data(self) -> dict[str, Any]:
        """The same as wallets take it (eth_signTypedData_v4)."""
        scope_epoch, root_epoch, account_epoch = self.epochs
        return {
            "types": {
                "EIP712Domain": [
                    {"name": "name", "type": "string"},
                    {"name": "version", "type": "string"},
                    {"name": "chainId", "type": "uint256"},
                    {"name": "verifyingContract", "type": "address"},
                ],
                "SessionGrant": [{"name": name, "type": kind} for name, kind in _FIELDS],
            },
            "primaryType": "SessionGrant",
            "domain": {
                "name": DOMAIN_NAME,
                "version": DOMAIN_VERSION,
                "chainId": self.chain_id,
                "verifyingContract": checksum(self.contract),
            },
            "message": {
                "account": checksum(self.account),
                "sessionKey": str(self.session_key),
                "cluster": self.cluster,
                "scope": "0x" + self.scope.hex(),
                "roles": list(self.roles),
                "scopeEpoch": scope_epoch,
                "rootEpoch": root_epoch,
                "accountEpoch": account_epoch,
                "issuedAt": self.issued_at,
                "expiresAt": self.expires_at,
                "nonce": "0x" + self.nonce.hex(),
            },
        }

    # --- EIP-4361 ---------------------------------------------------------------------------------

    def text(self) -> str:
        """The same as a text that every wallet shows (EIP-4361)."""
        resources = [
            f"wetware:contract:{checksum(self.contract)}",
            f"wetware:scope:0x{self.scope.hex()}",
            f"wetware:epochs:{'.'.join(map(str, self.epochs))}",
            *(f"wetware:role:{role}" for role in self.roles),
        ]
        return "\n".join(
            [
                f"{self.cluster}.wetware wants you to sign in with your Ethereum account:",
                checksum(self.account),
                "",
                f"Let the session key {self.session_key} act for this account in the cluster "
                f"{self.cluster}, with the roles {', '.join(self.roles)}.",
                "",
                f"URI: wetware:{self.session_key}",
                "Version: 1",
                f"Chain ID: {self.chain_id}",
                f"Nonce: {self.nonce.hex()}",
                f"Issued At: {_stamp(self.issued_at)}",
                f"Expiration Time: {_stamp(self.expires_at)}",
                "Resources:",
                *(f"- {resource}" for resource in resources),
            ]
        )

    def text_digest(self) -> bytes:
        """What is signed in the form of the text (EIP-191, personal_sign)."""
        text = self.text().encode()
        return keccak(b"\x19Ethereum Signed Message:\n" + str(len(text)).encode() + text)

    @classmethod
    def parse_text(cls, text: str) -> SessionGrant:
        """The inverse of `text`; raises InvalidArgument for anything that it does not render."""
        try:
            found = cls._parse_text(text)
            found.check()
            same = found.text() == text
        except (ValueError, IndexError, KeyError, OverflowError, InvalidArgument) as exc:
            raise _not_text(str(exc)) from None
        if not same:
            raise _not_text("it is not as it was offered to the wallet")
        return found

    @classmethod
    def _parse_text(cls, text: str) -> SessionGrant:
        if len(text) > TEXT_CHARS_MAX or not text.isascii():
            raise ValueError("too long, or not ASCII")
        lines = text.split("\n")
        resources = [line.removeprefix("- wetware:").partition(":") for line in lines[12:]]
        named = {kind: value for kind, _, value in resources if kind != "role"}
        epochs = [int(part) for part in named["epochs"].split(".")]

        def field(line: int, name: str) -> str:
            label, colon, value = lines[line].partition(": ")
            if label != name or not colon:
                raise ValueError(f"line {line + 1} is not {name}")
            return value

        return cls(
            chain_id=int(field(7, "Chain ID")),
            contract=parse_address(named["contract"]),
            account=parse_address(lines[1]),
            session_key=PeerId.parse(field(5, "URI").removeprefix("wetware:")),
            cluster=lines[0].partition(".")[0],
            scope=bytes.fromhex(named["scope"].removeprefix("0x")),
            roles=tuple(value for kind, _, value in resources if kind == "role"),
            epochs=(epochs[0], epochs[1], epochs[2]),
            issued_at=_unstamp(field(9, "Issued At")),
            expires_at=_unstamp(field(10, "Expiration Time")),
            nonce=bytes.fromhex(field(8, "Nonce")),
        )

    # --- as the login's payload has it ------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "session_key": str(self.session_key),
            "roles": list(self.roles),
            "epochs": list(self.epochs),
        }

    @classmethod
    def from_plain(cls, value: Any) -> SessionGrant:
        """The inverse of `plain`, checked; raises InvalidArgument."""
        if not isinstance(value, Mapping) or value.keys() != {f.name for f in fields(cls)}:
            raise InvalidArgument("not a session", code="invalid.session")
        kinds: dict[str, type] = {
            "chain_id": int, "contract": bytes, "account": bytes, "session_key": str,
            "cluster": str, "scope": bytes, "roles": list, "epochs": list, "issued_at": int,
            "expires_at": int, "nonce": bytes,
        }  # fmt: skip
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise InvalidArgument(f"a session with a wrong {name}", code="invalid.session")
        roles, epochs = value["roles"], value["epochs"]
        if not all(type(role) is str for role in roles) or len(roles) > ROLES_MAX:
            raise InvalidArgument("a session with wrong roles", code="invalid.session")
        if len(epochs) != 3 or not all(type(epoch) is int for epoch in epochs):
            raise InvalidArgument("a session with wrong epochs", code="invalid.session")
        found = cls(
            **{
                **value,
                "session_key": PeerId.parse(value["session_key"]),
                "roles": tuple(roles),
                "epochs": tuple(epochs),
            }
        )
        found.check()
        return found


def _not_text(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"not the text of a wetware session (EIP-4361): {why[:120]}",
        hint="sign the text that `ww auth evm login` shows, unchanged",
        code="invalid.session",
    )


def _stamp(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unstamp(text: str) -> int:
    return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def recover(digest: bytes, signature: bytes) -> bytes:
    """The account that signed a digest; raises ValueError for any but the one form of a signature.

    65 bytes, v 27 or 28, and the lower s: of two signatures that mean the same, one is refused, so
    that nobody can turn one into another (EIP-2).
    """
    import coincurve

    if len(signature) != 65:
        raise ValueError(f"a signature has 65 bytes, not {len(signature)}")
    if signature[64] not in (27, 28):
        raise ValueError("its v is neither 27 nor 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise ValueError("its s is in the upper half")
    try:
        public = coincurve.PublicKey.from_signature_and_message(
            signature[:64] + bytes([signature[64] - 27]), digest, hasher=None
        )
    except Exception as exc:  # coincurve raises plain Exception
        raise ValueError("it is no signature") from exc
    return keccak(public.format(compressed=False)[1:])[12:]


def known_roles(names: Sequence[str]) -> tuple[str, ...]:
    """Roles as a session has them: sorted, each once."""
    return tuple(sorted(set(names)))
