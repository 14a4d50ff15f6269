"""Answers and references -> scores: reading answers, comparing them, reporting."""
