"""Reading a bank: what is checked at opening, and positional reads after it."""
