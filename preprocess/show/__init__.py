"""Show a bank to a person: a table of the whole, a picture of one clip."""
