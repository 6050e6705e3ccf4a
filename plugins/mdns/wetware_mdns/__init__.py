"""Find the other nodes of the cluster on the same local network, by multicast DNS."""
