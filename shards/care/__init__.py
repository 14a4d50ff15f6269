"""Looking after a bank: what is damaged, unfinished, left over, different."""
