"""Records -> tokens -> rows -> steps: the plan of a run, and its batches."""
