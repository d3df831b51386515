"""`python -m webapp.cli`, where the console script is not on the path."""

from webapp.cli import main

main()
