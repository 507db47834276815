"""Fixtures that several test files share."""

from config_case import run_file

__all__ = ["run_file"]
