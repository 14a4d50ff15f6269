"""A bank for people to look at: a table of the whole, a picture of one clip."""
