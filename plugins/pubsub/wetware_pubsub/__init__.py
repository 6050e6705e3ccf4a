"""Publish and subscribe: a topic is a capability, carried between nodes by GossipSub 1.1."""
