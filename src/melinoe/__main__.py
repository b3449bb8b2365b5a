"""`python -m melinoe`."""

from melinoe.cli.main import main

main()
