"""A benchmark with exact answers, assembled from a user's own videos."""
