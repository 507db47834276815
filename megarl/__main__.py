"""`python -m megarl`, for launchers that start a Python module."""

from megarl.cli.main import main

if __name__ == "__main__":
    main()
