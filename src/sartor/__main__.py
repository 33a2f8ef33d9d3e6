"""``python -m sartor``: the command ``sartor``."""

from sartor.cli import main

main()
