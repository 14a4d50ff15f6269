"""The model that a run starts from: a stage on disk, loaded and prepared for training."""
