import sys

from ppolite.cli import main

if __name__ == "__main__":
    sys.exit(main())
