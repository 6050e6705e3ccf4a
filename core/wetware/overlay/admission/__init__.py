"""Who belongs to the cluster, and who may speak what: one decision, in one place.

A cluster is named by its founding: the cluster's public key and the auth backend. A node is a
member by a certificate that the cluster key signed, or an inviter that the cluster key certified;
both ends of a connection show theirs and check the other's offline.

- `statements`: what is signed: certificates, chains, tombstones;  `texts`: tickets, bundles
- `store`: the files;  `decision`: `Admission`, which decides;  `limits`: `[admission]` of ww.toml
- `service`: the protocols, on a link host;  `joining`: how a node gets its first certificate
"""
