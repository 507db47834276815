"""How the suite is spread over processes, what its quick form leaves out, and what each file may take: hooks of pytest.

A file is one piece of work, so that its module's fixtures are made once, and the longest begin first, by the times of
`durations.json`. Tests that mostly wait (joins, watchdogs, Slurm) then run beside those that compute. Where a
file's tests share nothing it is split (`SPLIT`), and files that share something large are one piece (`TOGETHER`).

`--quick` leaves out what starts worlds of ranks, engines, whole runs, a browser or a scheduler; a test that starts
processes by `preloaded` all the same fails there.

The whole suite fails where a file took far more than `durations.json` has for it. All files' times are first
divided by this machine's pace, the median of time taken over time written down, so that a slow or a busy
machine does not count. `--keep-durations` writes the file anew.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

DURATIONS = Path(__file__).with_name("durations.json")

#: Files whose tests share no fixture that is slow to make.
SPLIT = frozenset({"test_push.py"})
#: Files that need the same fixture of the session, by the name of their piece.
TOGETHER = {"test_slurm_runs.py": "slurm", "test_submit_slurm.py": "slurm", "test_slurm.py": "slurm"}

#: Files that the quick form leaves out. Single tests of others are marked `processes`.
PROCESSES = frozenset(
    {
        "test_adapter_layouts.py",
        "test_adapter_run.py",
        "test_algorithm_runs.py",
        "test_algorithms_parity.py",
        "test_bench_reshard.py",
        "test_bootstrap_join.py",
        "test_bridge.py",
        "test_bridge_run.py",
        "test_conversion_peer.py",
        "test_conversion_policy.py",
        "test_cpu_platform.py",
        "test_docs_commands.py",
        "test_doctor.py",
        "test_judge_run.py",
        "test_moe_run.py",
        "test_opd_run.py",
        "test_plan_engine.py",
        "test_plan_measured.py",
        "test_policy_experts.py",
        "test_policy_guards.py",
        "test_policy_parity.py",
        "test_policy_sets.py",
        "test_policy_state.py",
        "test_preflight.py",
        "test_preflight_network.py",
        "test_push.py",
        "test_push_absence.py",
        "test_push_checksum.py",
        "test_weight_source.py",
        "test_report_page.py",
        "test_reproduce.py",
        "test_reshard_vllm.py",
        "test_resume.py",
        "test_servers_vllm.py",
        "test_rollout_engine.py",
        "test_rollout_moe.py",
        "test_runs.py",
        "test_sft.py",
        "test_slurm.py",
        "test_slurm_runs.py",
        "test_start_shortcut.py",
        "test_suite_runs.py",
        "test_stops.py",
        "test_submit.py",
        "test_submit_slurm.py",
        "test_tools_compare.py",
        "test_tools_conversion.py",
        "test_trust.py",
        "test_watchdog.py",
        "test_weight_map_megatron.py",
    }
)

#: A file may take this many times what is written down, and so many seconds more.
FACTOR, GRACE = 3.0, 20.0
#: Seconds from which on a file's time says something of the machine's pace.
TELLING = 2.0


def file_of(nodeid: str) -> str:
    """The name of the file that a test is in."""
    return Path(nodeid.partition("::")[0]).name


def piece_of(nodeid: str) -> str:
    """What is run in one process, one test after another, with the test of that name."""
    name = file_of(nodeid)
    return nodeid if name in SPLIT else TOGETHER.get(name, name)


def budget_faults(taken: dict[str, float], written: dict[str, float]) -> list[str]:
    """A sentence for each file that outgrew its budget; seconds by file, of this run and as written down.

    Of a part of the suite nothing is said: who makes a session's fixture first pays for it.
    """
    if not written or not written.keys() <= taken.keys():
        return []
    telling = [taken[name] / written[name] for name in taken if written.get(name, 0.0) >= TELLING]
    pace = max(1.0, statistics.median(telling)) if telling else 1.0
    found = []
    for name, seconds in sorted(taken.items()):
        known = written.get(name, 0.0)
        allowed = pace * (FACTOR * known + GRACE)
        if seconds > allowed:
            found.append(
                f"{name} took {seconds:.0f} s, and {known:.0f} s are written down in {DURATIONS.name}: may take "
                f"{allowed:.0f} s at this machine's pace. Fix: make it faster, or, where it is worth its time, run the "
                "whole suite with --keep-durations"
            )
    return found


class Schedule(LoadScopeScheduling):
    """Pieces in the order of the collection, which `pytest_collection_modifyitems` has sorted."""

    def _split_scope(self, nodeid: str) -> str:
        return piece_of(nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out tests that start processes")
    parser.addoption("--keep-durations", action="store_true", help="write tests/durations.json anew")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: starts worlds of ranks, engines, whole runs or a scheduler")
    config.option.loadscopereorder = False
    if config.getoption("--quick"):
        os.environ["MEGARL_TESTS_QUICK"] = "1"
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(config), "times")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    return Schedule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if _starts_processes(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    seconds: dict[str, float] = defaultdict(float)
    for name, known in read_durations().items():
        seconds[TOGETHER.get(name, name)] += known
    # Tests of a split file are as long as the file here: they begin early, each of them.
    items.sort(key=lambda item: -seconds[TOGETHER.get(file_of(item.nodeid), file_of(item.nodeid))])


def _starts_processes(item: pytest.Item) -> bool:
    return file_of(item.nodeid) in PROCESSES or item.get_closest_marker("processes") is not None


def read_durations() -> dict[str, float]:
    return json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.is_file() else {}


class Times:
    """Seconds that each file's tests took, in the process that reports them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._taken: dict[str, float] = defaultdict(float)
        self._faults: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._taken[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.option.collectonly or session.exitstatus not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
        ):
            return
        if self._config.getoption("--keep-durations"):
            kept = {name: round(seconds, 1) for name, seconds in sorted(self._taken.items()) if seconds >= 0.5}
            DURATIONS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            return
        self._faults = budget_faults(self._taken, read_durations())
        if self._faults:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for fault in self._faults:
            terminalreporter.write_line(f"FAILED budget: {fault}", red=True)
