"""`python -m preprocess` is `preprocess`."""

from preprocess.cli.main import main

main(prog_name="preprocess")
