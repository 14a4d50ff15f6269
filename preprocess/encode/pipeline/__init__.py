"""Decode ahead of the tower, write behind it, and measure where the time goes."""
