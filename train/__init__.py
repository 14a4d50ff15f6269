"""Training, evaluation and questions on banked features."""
