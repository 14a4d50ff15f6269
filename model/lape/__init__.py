"""LAPE: coordinates as tokens, and as positions of visual cells."""
