"""`python -m flashtile`."""

from flashtile.cli.app import main

if __name__ == "__main__":
    main()
