"""The settings of a run: declared once, read from flags, environment and YAML."""
