"""The formats of IPFS: CIDs, dag-pb, UnixFS and CAR. Bytes in, bytes out."""
