"""Read a bank: checks when it is opened, then positional reads."""
