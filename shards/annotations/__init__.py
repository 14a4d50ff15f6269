"""Annotation files -> rows of one form, read by both encode and train."""
