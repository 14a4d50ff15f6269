"""What a run measures on its machine before it begins, and keeps."""
