"""The model that a run starts from: a stage on disk, made ready for training."""
