"""Find the other nodes of the cluster through libp2p's distributed hash table."""
