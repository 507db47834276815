"""Compare the algorithms on the CPU: the papers' claims in miniature, each through whole runs of `megarl train`.

Experiments on generated arithmetic with a tiny policy: `nft` (NFT against RFT and GRPO), `exp_grpo` (ExP-GRPO and
ExP-DPO against GRPO where the start solves nothing), `start` (START against GRPO where the reward has a shortcut),
`bridge` and `bridge_flipped` (BRIDGE against other ways to learn demonstrations and from rollouts, where the former
cover two kinds of problems in three; and where a fifth of the rewards are flipped), `attnrl` (AttnRL against GRPO and
TreeRL on chains in which the start slips, and without each of its parts).
Every arm of an experiment starts from the same warmed-up policy. What they show and do not show: docs/claims.md.

--out gets claims.json, claims.md, claims.png, and a folder per run. Finished runs are not repeated, and an interrupted
one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare import experiments, inputs, pass_at, report, runs

EXAMPLES = """examples:
  python tools/compare_algorithms.py --out runs/compare
  python tools/compare_algorithms.py --out runs/compare --algorithms start --seeds 5
  python tools/compare_algorithms.py --prepare exp_grpo start tools
"""


#: What can be made by name: the start of every experiment, and that of configs/quickstart_tools.yaml.
STARTS = {name: experiment.start for name, experiment in experiments.EXPERIMENTS.items()} | {"tools": inputs.TOOLS}


def prepare(names: Sequence[str], root: Path, sizes: inputs.Sizes) -> None:
    """Make the data and warm-ups of starts."""
    for name in names:
        inputs.prepare(STARTS[name], root, sizes)


def run_experiment(
    experiment: experiments.Experiment,
    out: Path,
    root: Path,
    seeds: Sequence[int],
    changes: Sequence[str],
    sizes: inputs.Sizes,
) -> tuple[experiments.Runs, float | None]:
    """All runs of an experiment, what is finished aside; then the start's pass@k where the experiment asks for it."""
    found: dict[str, list[runs.Recorded]] = {arm.name: [] for arm in experiment.arms}
    start = inputs.recipe(experiment.start, sizes)
    total, number = len(experiment.arms) * len(seeds), 0
    for seed in seeds:
        for arm in experiment.arms:
            number += 1
            folder = out / "runs" / f"{experiment.name}_{arm.name}_seed{seed}"
            print(f"{experiment.name}: run {number} of {total}: {arm.label}, seed {seed}", flush=True)
            own = [*arm.overrides, f"seed={seed}", *changes]
            seconds = 0.0
            if arm.before:
                first = folder.with_name(f"{folder.name}_before")
                seconds = runs.train(first, arm.config, [*arm.before, f"seed={seed}", *changes], root, start)
                own.append(f"model.weights={first}/checkpoints")
            seconds += runs.train(folder, arm.config, own, root, start)
            found[arm.name].append(runs.read(folder))
            words = f"{seconds:.0f} s" if seconds else "was finished already"
            print(f"    {words}; accuracy {found[arm.name][-1].final('accuracy'):.3f}", flush=True)
    solved = None
    if experiment.pass_at:
        print(f"{experiment.name}: pass@{experiment.pass_at} of the start", flush=True)
        solved = pass_at.solved_share(experiment, out, root, changes, start)
    return found, solved


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(experiments.EXPERIMENTS)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, help="folder for the results")
    goal.add_argument("--prepare", nargs="+", choices=list(STARTS), help="only make the inputs of these")
    parser.add_argument("--algorithms", nargs="+", choices=names, default=names, help="experiments (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm, each with its own seed (default 3)")
    parser.add_argument(
        "--first-seed", type=int, default=1, help="seed of the first run; the others follow (default 1)"
    )
    parser.add_argument("--inputs", type=Path, default=Path(), help="folder of data/ and runs/ (default: here)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change settings of every run")
    sizes = inputs.Sizes()
    for name, text in (
        ("warmup_rows", "worked solutions for the warm-up (default: as the experiment says)"),
        ("train_rows", f"training problems (default {sizes.train_rows})"),
        ("heldout_rows", f"held-out problems (default {sizes.heldout_rows})"),
        ("warmup_steps", "steps of the warm-up (default: as the experiment says)"),
    ):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(sizes, name), help=text)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    options.sizes = inputs.Sizes(options.warmup_rows, options.train_rows, options.heldout_rows, options.warmup_steps)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    root = options.inputs.resolve()
    try:
        prepare(options.prepare or options.algorithms, root, options.sizes)
        if options.prepare:
            return 0
        done = []
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        began = time.monotonic()
        for name in options.algorithms:
            experiment = experiments.EXPERIMENTS[name]
            found, solved = run_experiment(experiment, options.out.resolve(), root, seeds, options.set, options.sizes)
            done.append((experiment, found, experiment.claims(found, solved)))
            # What is known so far is written after each experiment.
            report.write(options.out, done, seeds)
    except (runs.RunFailed, ValueError) as error:
        print(f"compare_algorithms: {error}", file=sys.stderr)
        return 1
    for _, _, made in done:
        for claim in made:
            print(f"{'holds        ' if claim.holds else 'DOES NOT HOLD'}  {claim.claim}")
    print(f"{options.out}/claims.md, claims.json, claims.png; {(time.monotonic() - began) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
