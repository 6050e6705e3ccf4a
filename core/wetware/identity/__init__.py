"""Who somebody is: peer IDs, keys and their files, principals, and the words of a login."""

from wetware.base.private_files import (
    read_private_file,
    replace_private_file,
    write_new_private_file,
)
from wetware.identity.keys import Key, verify
from wetware.identity.login import (
    CHALLENGE_BYTES_MAX,
    NONCE_BYTES,
    Challenge,
    Channel,
    LoginStatus,
    Principal,
    Proof,
    Signer,
)
from wetware.identity.peer_id import PEER_ID_CHARS_MAX, PeerId, from_hex

__all__ = [
    "CHALLENGE_BYTES_MAX",
    "NONCE_BYTES",
    "PEER_ID_CHARS_MAX",
    "Challenge",
    "Channel",
    "Key",
    "LoginStatus",
    "PeerId",
    "Principal",
    "Proof",
    "Signer",
    "from_hex",
    "read_private_file",
    "replace_private_file",
    "verify",
    "write_new_private_file",
]
