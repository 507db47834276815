"""What came of a fault: what was seen, and what that is worth."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.plan import AT_REST, Fault
from faults.runs import JOIN_LIMIT, KEEP, LIMITS, NOTICE, SILENCE

#: Seconds beyond a limit for the processes to write their stacks and end.
MARGIN = 20.0

#: What torch's launcher gives a process that does not end, before it kills it.
LAUNCHER = 30.0

#: Seconds that a rank's phase takes to be known to the others.
KNOWN_AFTER = 0.5

#: Seconds for a run to start, load and train to its end.
WHOLE_RUN = 120.0

RECOVERED, REFUSED = "recovered", "refused correctly"
HUNG, LOST, WRONG_WEIGHTS = "hung", "lost a checkpoint", "wrong weights"
WRONG_NAME, NO_MESSAGE, LATE, WRONG_END = "wrong rank named", "no message", "late", "wrong end"
GOOD = (RECOVERED, REFUSED)


@dataclass
class Seen:
    """Everything about one fault. Times in seconds from its moment."""

    number: int
    name: str
    kind: str
    world: str
    phase: str
    rank: int
    outcome: str = ""
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    code: int | None = None
    said: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    ended: bool = True
    traceback: bool = False
    left_over: int = 0
    complete: bool = False
    lost: list[str] = field(default_factory=list)
    resume_code: int | None = None
    resume_seconds: float = 0.0
    resume_said: str = ""
    differs: str | None = None
    names_right: bool | None = None

    @classmethod
    def of(cls, fault: Fault) -> Seen:
        return cls(fault.number, fault.name, fault.kind, fault.world, fault.phase, fault.rank)

    def line(self) -> str:
        """One line of results.jsonl."""
        return json.dumps(asdict(self))


def limit_of(fault: Fault, watched: bool) -> float:
    """How long the job may take to end after the fault."""
    if fault.kind in AT_REST or fault.kind == "reward":
        return WHOLE_RUN
    if fault.kind in ("hang", "network", "stall"):
        if not watched:
            return JOIN_LIMIT + LAUNCHER + MARGIN
        return (LIMITS[fault.phase] if fault.kind == "stall" else SILENCE) + MARGIN
    if fault.kind in ("term", "usr1"):
        return NOTICE + MARGIN
    return MARGIN


def last_words(text: str) -> str:
    """The last sentence that the command said."""
    found = [line for line in text.splitlines() if line.startswith("megarl: ") and "pre-flight: " not in line]
    return found[-1].removeprefix("megarl: ") if found else ""


def lost(run: Path, before: list[str]) -> list[str]:
    """Which of the checkpoints that were finished before are not whole now, though not due for removal."""
    from megarl.formats import checkpoint_folder

    state = dict(checkpoint_folder.survey(run)) if (run / "checkpoints").is_dir() else {}
    whole = {
        folder.name for folder, damage in state.items() if damage is None and checkpoint_folder.altered(folder) is None
    }
    newest = sorted({*before, *whole}, reverse=True)[:KEEP]
    return sorted(name for name in before if name not in whole and name in newest)


def judge(fault: Fault, seen: Seen) -> None:
    """Set the outcome, and why."""
    seen.outcome, seen.why = _judged(fault, seen)


def _judged(fault: Fault, seen: Seen) -> tuple[str, str]:
    if not seen.ended:
        return HUNG, f"{seen.left_over} processes were still there after {seen.seconds:.0f} s"
    if seen.lost:
        return LOST, ", ".join(seen.lost)
    if seen.resume_code != 0:
        return WRONG_END, f"the run that went on ended with code {seen.resume_code}: {seen.resume_said}"
    if seen.differs:
        return WRONG_WEIGHTS, seen.differs
    if (wrong := _wrong_end(fault, seen)) is not None:
        return wrong
    if seen.seconds > seen.limit:
        return LATE, f"{seen.seconds:.1f} s, of which {seen.limit:.0f} are allowed"
    return (REFUSED if fault.kind in ("disk-full", "disk-short", "all-damaged") else RECOVERED), ""


def _wrong_end(fault: Fault, seen: Seen) -> tuple[str, str] | None:
    """What is wrong with how the run that met the fault ended."""
    if fault.kind in ("group", "launcher"):
        return None if seen.code == -9 else (WRONG_END, f"code {seen.code}")
    if seen.traceback:
        return NO_MESSAGE, "a traceback instead of a sentence"
    if (fault.kind in AT_REST and fault.kind != "all-damaged") or fault.kind == "reward":
        if seen.code != 0:
            return WRONG_END, f"code {seen.code}: {seen.said}"
        return (NO_MESSAGE, "does not name the damaged checkpoint") if seen.names_right is False else None
    if fault.kind in ("term", "usr1") and seen.complete:
        # There was nothing left to stop.
        return None if seen.code == 0 else (WRONG_END, f"code {seen.code}")
    if not any(seen.said):
        return NO_MESSAGE, "ended without a word"
    if fault.kind in ("term", "usr1"):
        return None if seen.code == 75 else (WRONG_END, f"code {seen.code}")
    if fault.kind in ("disk-full", "disk-short", "all-damaged"):
        wanted = "Damaged|checkpoint" if fault.kind == "all-damaged" else "No space left|free"
        if seen.code != 2:
            return WRONG_END, f"code {seen.code}"
        return None if re.search(wanted, seen.said[0]) else (NO_MESSAGE, "does not say what is wrong")
    if seen.code != 75:
        return WRONG_END, f"code {seen.code}"
    words = [said for said in seen.said if said]
    seen.names_right = all(_names(said, seen.note, fault) for said in words)
    return None if seen.names_right else (WRONG_NAME, " / ".join(seen.said))


def _names(said: str, note: dict[str, Any], fault: Fault) -> bool:
    """Whether a sentence names the rank of the fault and its phase.

    A rank that stops as soon as it enters a phase could not say so: then its last phase is right too. Before anything
    watches over the ranks, there are no phases, and the start has a part with a name of its own. Of hosts that are cut
    off from each other, those without the ranks' store know of rank 0's alone, and of no phase but their own.
    """
    if "had no answer from the ranks' store" in said:
        known = "rank 0's host hangs, is gone or is cut off" in said
        return known and fault.world == "apart" and (fault.kind == "network" or note["rank"] == 0)
    named = re.search(r"ranks? (\d+)", said)
    if named is None or int(named.group(1)) != note["rank"]:
        return False
    if (phase := re.search(r"in phase (\w+)", said)) is None:
        return not note["watched"] or (note["phase"] == "start" and "to the pre-flight" in said)
    return phase.group(1) in {note["phase"]} | ({note["before"]} if note["since"] < KNOWN_AFTER else set())
