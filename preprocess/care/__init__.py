"""Encode clips of an existing bank once more: those that are damaged (repair) or failed (retry)."""
