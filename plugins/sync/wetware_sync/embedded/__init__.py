"""The default engine: SQLite at one home, without failover."""
