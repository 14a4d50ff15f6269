"""The files of a bank, as dataclasses that read and write themselves."""
