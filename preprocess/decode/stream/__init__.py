"""What the packets of a video stream say: which stream to read, its clock, its orientation,
and which of its frames are taken."""
