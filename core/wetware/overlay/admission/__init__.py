"""Who belongs to the cluster, and who may speak what: one decision, in one place.

A cluster is named by its founding: the cluster's public key and the auth backend. A node is a
member by a certificate that the cluster key signed, or an inviter that the cluster key certified;
both ends of a connection show theirs and check the other's offline.

- `statements`: what is signed: certificates, chains, tombstones;  `texts`: tickets, bundles
- `decision`: `Admission`, which decides, of these parts:
  `judge`: which certificates are valid;  `members`: who has shown one;  `facts`: who was evicted;
  `own_certificate`: what this node shows;  `issuing`: what it signs for others
- `store`: the data directory, in `files`;  `tickets`, `ledger`: what an issuer keeps there
- `service`: the protocols (`exchange`) on a link host;  `joining`: how a node becomes a member
- `limits`: `[admission]` of ww.toml
"""
