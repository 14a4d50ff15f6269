"""Records -> tokens -> rows -> steps: the run as a plan, and its batches."""
