"""Clips -> shards: plan, tower, pooling, workers, repair."""
