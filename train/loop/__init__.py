"""The steps of a run: gradients, optimizer, checkpoints, metrics."""
