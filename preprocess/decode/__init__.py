"""A video -> the frames that were asked for, in a process that can be killed."""
