"""Records from annotation files, joined to banked clips."""
