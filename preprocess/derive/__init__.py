"""A bank -> another bank of coarser cells, fewer frames or another codec: no video, no tower."""
