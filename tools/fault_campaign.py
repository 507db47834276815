"""Break training runs on purpose, and see that each ends in time with the right sentence, and goes on exactly.

Every fault meets a run of `megarl train` with Megatron, vLLM and a real process group: ranks killed, stopped and
stalled in every phase, jobs told to stop, full disks, damaged checkpoints, a cut network, graders that die. Then the
same command is given again, and the final weights are compared to the bit with those of a run that nothing happened to.

--out gets results.jsonl, report.md, campaign.png, and each run's logs. A campaign that was interrupted goes on with the
same command. The exit code is 1 where a fault did not end well.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Light imports alone: a process that a run spawns imports this file once more.
from faults import places, plan, report, verdict

EXAMPLES = """examples:
  python tools/fault_campaign.py --out runs/faults
  python tools/fault_campaign.py --out runs/faults --faults 20 --kinds kill hang stall
"""


class OtherSeed(Exception):
    """A folder holds the results of another seed."""


class Campaign:
    """Makes the faults of a plan, one after another. `out`: where results go."""

    def __init__(self, out: Path, faults: Sequence[plan.Fault]) -> None:
        from faults import runs

        self._out, self._faults = out, faults
        # Damage is done to a run of two ranks.
        worlds: set[plan.World] = {"pair", *(fault.world for fault in faults)}
        self._references = {world: runs.Reference(out, world) for world in worlds}
        self._halfway = runs.Halfway(self._references["pair"])

    def prepare(self, say: Any) -> None:
        """What faults are compared with."""
        from faults import process, runs

        os.environ["PYTHONPATH"] = runs.python_path()
        say("making data, tokenizer and model")
        runs.write_inputs(self._out)
        say("importing Megatron and vLLM")
        process.preload()
        for world in sorted({fault.world for fault in self._faults}):
            say(f"a run without a fault: {world}")
            if world == "apart":
                with places.two_hosts() as hosts:
                    self._references[world].make(hosts)
            else:
                self._references[world].make(None)
        if any(fault.kind in plan.AT_REST for fault in self._faults):
            say("a run to damage")
            self._halfway.make()

    def make(self, fault: plan.Fault, say: Any) -> verdict.Seen:
        """Make one fault, and note its result."""
        from faults.trial import Trial

        seen = Trial(fault, self._references[fault.world], self._halfway, say).make()
        with open(self._out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(seen.line() + "\n")
        return seen


def possible(faults: Sequence[plan.Fault], out: Path) -> tuple[list[plan.Fault], list[str]]:
    """The faults that can be made here, and a line for each sort of those that cannot."""
    skipped, left = [], list(faults)
    for what, needs, why in (
        (
            "a small disk",
            lambda fault: fault.kind.startswith("disk"),
            lambda: places.why_no_disk(out / "disks" / "try"),
        ),
        ("network namespaces", lambda fault: fault.world == "apart", places.why_no_hosts),
    ):
        if any(map(needs, left)) and (reason := why()) is not None:
            skipped.append(f"{sum(map(needs, left))} faults skipped that need {what}: {reason}")
            left = [fault for fault in left if not needs(fault)]
    return left, skipped


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(soft_wrap=True, highlight=False)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    keep_seed(out, options.seed)
    faults, skipped = possible(plan.plan(options.seed, options.faults, options.kinds), out)
    for line in skipped:
        console.print(line)
    names = {fault.name for fault in faults}
    done = {one["name"] for one in report.read(out)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Without a thread of its own: runs are forked from this process.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=len(faults), completed=len(names & done))

        def say(text: str) -> None:
            bar.update(task, description=text, refresh=True)

        if to_do := [fault for fault in faults if fault.name not in done]:
            campaign = Campaign(out, faults)
            campaign.prepare(say)
            for fault in to_do:
                say(fault.name)
                seen = campaign.make(fault, lambda text, name=fault.name: say(f"{name}: {text}"))
                bar.update(task, advance=1, refresh=True)
                console.print(line_of(seen))
                report.write(out, results_of(out, names), skipped, options.seed)
    results = results_of(out, names)
    report.write(out, results, skipped, options.seed)
    report.draw(out, results)
    show(console, results)
    return 0 if all(one["outcome"] in verdict.GOOD for one in results) else 1


def keep_seed(out: Path, seed: int) -> None:
    """Have the folder hold one seed's faults, whose names do not tell it. Raises `OtherSeed`."""
    file = out / "seed"
    if not file.is_file():
        file.write_text(f"{seed}\n", encoding="utf-8")
    elif (there := int(file.read_text(encoding="utf-8"))) != seed:
        raise OtherSeed(f"--seed {seed}: must be {there} as in {out}. Fix: use that seed, or another --out.")


def results_of(out: Path, names: set[str]) -> list[dict[str, Any]]:
    """What is known of the faults of this plan."""
    return [one for one in report.read(out) if one["name"] in names]


def line_of(seen: verdict.Seen) -> str:
    """One fault on the terminal."""
    good = seen.outcome in verdict.GOOD
    text = f"{'  ' if good else '! '}{seen.name:<28} {seen.outcome}, {seen.seconds:.1f} s of {seen.limit:.0f}"
    return text if good else f"{text}: {seen.why}"


def show(console: Any, results: Sequence[dict[str, Any]]) -> None:
    """The table on the terminal."""
    from rich.table import Table

    table = Table(*report.COLUMNS)
    for row in report.rows(results):
        table.add_row(*row)
    console.print(table)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seed", type=int, default=1, help="decides all faults (default 1)")
    parser.add_argument("--faults", type=int, default=plan.WHOLE, help=f"how many (default {plan.WHOLE})")
    kinds = list(plan.KINDS)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="kinds of faults (default all)")
    options = parser.parse_args(arguments)
    if options.faults < 1:
        parser.error("--faults must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    # Before anything is imported that would start threads, which a fork does not copy.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    options = parse_arguments(arguments)
    began = time.monotonic()
    from faults.runs import RunFailed

    try:
        code = run(options)
    except RunFailed as error:
        print(f"fault_campaign: {error}", file=sys.stderr)
        return 1
    except OtherSeed as error:
        print(f"fault_campaign: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}/report.md, campaign.png, results.jsonl; {(time.monotonic() - began) / 60:.0f} minutes")
    return code


if __name__ == "__main__":
    sys.exit(main())
