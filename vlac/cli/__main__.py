"""`python -m vlac.cli`."""

from vlac.cli import main

main()
