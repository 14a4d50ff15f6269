"""The run's settings: declared once, read from flags, environment and YAML."""
