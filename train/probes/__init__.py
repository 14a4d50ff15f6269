"""Answers that are read off banked frames without a language model."""
