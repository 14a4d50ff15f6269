"""Decoding ahead of the tower, writing behind it, and what the time went to."""
