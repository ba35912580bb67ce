"""`python -m growmoe`."""

from growmoe.cli import main

main()
