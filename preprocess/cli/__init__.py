"""The commands of `preprocess`: parsing only."""
