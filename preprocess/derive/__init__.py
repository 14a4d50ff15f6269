"""Derive a bank from another one: coarser cells, fewer frames, another codec; no video, no tower."""
