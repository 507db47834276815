"""`python -m megarl`, for launchers that start a Python module."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The working folder, where a user's random.py would hide Python's own from what is imported next.
        del sys.path[0]
    from megarl.cli.main import main

    main()
