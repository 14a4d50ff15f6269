"""Write a bank: shards under leases, then catalogue and quarantine, the manifest last."""
