"""``python -m hasten``: the command line."""

from __future__ import annotations

from hasten.cli import main

if __name__ == "__main__":
    main()
