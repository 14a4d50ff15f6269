"""The bank on disk: what is in which file, as dataclasses that read and write themselves."""
