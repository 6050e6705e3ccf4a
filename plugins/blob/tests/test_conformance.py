"""The service keeps the contract of services."""

from __future__ import annotations

from wetware.hookspecs import PluginContext
from wetware.testing import ServiceConformance
from wetware_blob.config import BlobConfig
from wetware_blob.service import BlobService

HELLO = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"


class TestBlob(ServiceConformance):
    config = BlobConfig()
    examples = {
        "Store.open": {"cid": HELLO, "local": True},
        "Store.unpin": {"root": HELLO},
        "Store.rm": {"root": HELLO},
        "Store.gc": {"dry_run": True},
        "Store.usage": {},
        "Store.all": {},
        "Sibling.have": {"roots": [bytes(32)]},
    }

    def make(self, ctx: PluginContext) -> BlobService:
        return BlobService(ctx)
