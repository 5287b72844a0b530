"""`python -m mocokit` is the command `mocokit`."""

from mocokit.cli import main

if __name__ == "__main__":
    main()
