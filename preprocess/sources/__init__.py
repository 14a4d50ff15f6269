"""Inputs -> clips: which there are, what is known of them undecoded, what has changed."""
