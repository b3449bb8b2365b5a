"""`python -m melinoe`."""

from melinoe.cli import main

main()
