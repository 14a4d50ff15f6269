"""What differs from one LLM family to another, and the proof that ours is each one's own forward."""
