"""Records of annotation files, joined to banked clips."""
