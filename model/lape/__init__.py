"""LAPE: coordinates as tokens, and as positions of visual cells.

`tables.py` has the six tables: a coordinate as input, as target, as position, and read from logits;
`tokens.py` their names and ids in the vocabulary; `head.py` one softmax over words and coordinates, and
the language loss.
"""
