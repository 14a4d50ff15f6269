"""The report of runs as a page: what they did, whether they learned, where they fail."""
