"""What a report is made of: metrics, scores, settings, frames of runs and banks on disk."""
