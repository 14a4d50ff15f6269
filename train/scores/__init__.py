"""Answers and references -> scores: what an answer says, what it is compared by, what to report."""
