"""A benchmark with exact answers, cut together from anybody's own videos."""
