"""The etcd engine: a cluster of etcd keeps the store, and some of its machines may die."""
