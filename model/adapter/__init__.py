"""A LoRA adapter around an LLM: which of its matrices get one, and its names in files."""
