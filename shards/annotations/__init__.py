"""Annotation files -> one shape of record; encode and train read the same."""
