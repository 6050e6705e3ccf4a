"""What `session.NAME` is for the services that come with wetware: for type checkers and editors.

The only place of the core that names plugins, and nothing of it runs: at runtime a client is found
by its entry point, ours as anybody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wetware.client.cluster import Cluster
    from wetware.client.grants import GrantsClient
    from wetware_audit.client import AuditClient
    from wetware_auth_evm.client import EvmAuth
    from wetware_auth_local.client import PolicyClient
    from wetware_blob.client import BlobStore
    from wetware_proc.client import Executor
    from wetware_proc.native.client import Native
    from wetware_pubsub.client import PubSub
    from wetware_sync.client import KeyValues
    from wetware_sync.holding import Sync
    from wetware_sync.naming import Names


class Bundled:
    """The base of Session."""

    if TYPE_CHECKING:
        # `grants` is a method of the session's own.
        audit: AuditClient
        auth_evm: EvmAuth
        auth_local: PolicyClient
        blob: BlobStore
        cluster: Cluster
        grants_service: GrantsClient
        kv: KeyValues
        names: Names
        native: Native
        proc: Executor
        pubsub: PubSub
        sync: Sync
