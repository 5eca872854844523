"""`python -m hasten`: the same as `hasten`."""

from hasten.cli.main import main

main()
