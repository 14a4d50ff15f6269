"""What the packets of a video stream say: which is meant, its clock, how it is turned."""
