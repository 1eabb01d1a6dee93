"""``python -m genpulse`` is the console script ``genpulse``."""

from genpulse.cli import main

if __name__ == "__main__":
    main()
