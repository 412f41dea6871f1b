"""``python -m polyak``: the command line where the command ``polyak`` is not on the path."""

from polyak.cli import main

if __name__ == "__main__":
    main()
