"""Differences between LLM families, and the check that our forward equals each family's own."""
