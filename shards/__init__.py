"""The bank on disk: its format, writer, catalogue and reader. Imports neither torch nor the rest."""
