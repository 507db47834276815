"""Fixtures that several test files share."""

from collections.abc import Iterator

import hypothesis
import pytest
import slurm_cluster
from config_case import run_file

__all__ = ["run_file", "slurm"]

pytest_plugins = ["suite_schedule"]

# How long one example takes says nothing where tests run side by side.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurm_cluster.Cluster]:
    """A Slurm of two nodes on this host, for the whole session."""
    if missing := slurm_cluster.missing():
        pytest.skip(f"needs Slurm: no {', '.join(missing)} on this machine (Debian, Ubuntu: slurm-wlm, munge)")
    with slurm_cluster.running() as cluster:
        yield cluster
