"""`python -m preprocess`: the same commands as `preprocess`."""

from preprocess.cli.main import main

main(prog_name="preprocess")
