"""An etcd that some members run, and that speaks over their own links."""
