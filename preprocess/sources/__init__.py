"""Inputs -> clips: find them, read their headers, compare them with the plan."""
