"""Writing a bank: one shard at a time, one writer at a time, the manifest last."""
