"""Encode clips into shards: plan, decoders, tower, pooling, workers."""
