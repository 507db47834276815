"""What is compared: for each experiment its start, its arms, and the claims that are read off its runs.

All arms of an experiment share its configuration file but for what their overrides name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from compare import inputs
from compare.claims import Claim, Figure, above, at_least, figure
from compare.runs import TOKENS, Recorded

#: Runs of an experiment: by arm, then in the order of the seeds.
Runs = Mapping[str, Sequence[Recorded]]
ABOVE = "mean of {} > mean of {} + 2 standard errors of the difference"
MATCHES = "mean of {} >= mean of {} - 2 standard errors of the difference"
LEAVES = ", and {} >= 0.1 with every seed"


@dataclass(frozen=True)
class Arm:
    """One way to train, in the configuration file `config` changed by `overrides`, after a run changed by `before`
    where that is given, from whose end it then begins."""

    name: str
    label: str
    config: str
    overrides: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One picture: the arms' curves of `metric`, or of one arm's several metrics."""

    title: str
    metrics: Mapping[str, str]
    arms: tuple[str, ...]
    over: str = "step"


@dataclass(frozen=True)
class Experiment:
    """A start, arms, and claims read off the runs. Where `pass_at` is not 0, that many answers to each held-out problem
    are drawn from the start, and the claims are told the share of problems with a right one."""

    name: str
    title: str
    start: inputs.Inputs
    arms: tuple[Arm, ...]
    claims: Callable[[Runs, float | None], list[Claim]]
    panels: tuple[Panel, ...]
    pass_at: int = 0


def finals(runs: Runs, arm: str, metric: str) -> Figure:
    """`metric` of the last evaluation, by seed."""
    return figure([run.final(metric) for run in runs[arm]])


def first(runs: Runs, arm: str, metric: str) -> Figure:
    """`metric` where it was recorded first, by seed."""
    return figure([run.curve(metric)[0][1] for run in runs[arm]])


def means(runs: Runs, arm: str, metric: str) -> Figure:
    """Mean of `metric` over the run's evaluations or steps, by seed."""
    return figure([run.mean(metric) for run in runs[arm]])


def nft_claims(runs: Runs, _: float | None) -> list[Claim]:
    """NFT against RFT and GRPO, by held-out accuracy at the end and over the whole run."""
    made = []
    for name, words, read in (("end", "at the end", finals), ("course", "over the course of the run", means)):
        nft, rft, grpo = (read(runs, arm, "accuracy") for arm in ("nft", "rft", "grpo"))
        made += [
            Claim(
                f"nft_rft_{name}",
                "NFT, arXiv 2505.18116",
                f"NFT matches or surpasses RFT in held-out accuracy {words}.",
                MATCHES.format("nft", "rft"),
                {"nft": nft, "rft": rft},
                at_least(nft, rft),
            ),
            Claim(
                f"nft_grpo_{name}",
                "NFT, arXiv 2505.18116",
                f"NFT matches or surpasses GRPO in held-out accuracy {words}.",
                MATCHES.format("nft", "grpo"),
                {"nft": nft, "grpo": grpo},
                at_least(nft, grpo),
            ),
        ]
    return made


def exp_grpo_claims(runs: Runs, solved: float | None) -> list[Claim]:
    """ExPO on problems that the start does not solve, and the two properties of its explanations."""
    source = "ExPO, arXiv 2507.02834"
    grpo, exp_grpo, exp_dpo = (finals(runs, arm, "accuracy") for arm in ("grpo", "exp_grpo", "exp_dpo"))
    most = figure([max(value for _, value in run.curve("accuracy")) for run in runs["grpo"]])
    own, explained, expert = (first(runs, "exp_grpo", f"{kind}_chain_nll") for kind in ("own", "explanation", "expert"))
    own_answer, explained_answer = (
        first(runs, "exp_grpo", f"{kind}_answer_log_prob") for kind in ("own", "explanation")
    )
    made = [
        Claim(
            "expo_grpo_stays",
            source,
            "Where the start solves nothing, GRPO has nothing to learn from and stays there.",
            "greatest accuracy of grpo in any evaluation <= 0.02 with every seed",
            {"grpo_greatest": most},
            max(most.per_seed) <= 0.02,
        ),
        Claim(
            "expo_leaves",
            source,
            "ExP-GRPO leaves it.",
            ABOVE.format("exp_grpo", "grpo") + LEAVES.format("exp_grpo"),
            {"exp_grpo": exp_grpo, "grpo": grpo},
            above(exp_grpo, grpo) and min(exp_grpo.per_seed) >= 0.1,
        ),
        Claim(
            "expo_dpo_leaves",
            source,
            "Iterative ExP-DPO leaves it too.",
            ABOVE.format("exp_dpo", "grpo") + LEAVES.format("exp_dpo"),
            {"exp_dpo": exp_dpo, "grpo": grpo},
            above(exp_dpo, grpo) and min(exp_dpo.per_seed) >= 0.1,
        ),
        Claim(
            "expo_in_distribution",
            source,
            "Given the question alone, self-explanations are likelier than an expert's chains, which cost about twice "
            "as much, and no likelier than the policy's own chains (nats per token, at the start).",
            "own <= explanation and explanation <= expert / 2, means over seeds",
            {"own": own, "explanation": explained, "expert": expert},
            own.mean <= explained.mean <= expert.mean / 2,
        ),
        Claim(
            "expo_useful",
            source,
            "The right answer is likelier after a self-explanation than after the policy's own chain (log-probability "
            "in nats, at the start).",
            ABOVE.format("explanation", "own"),
            {"explanation": explained_answer, "own": own_answer},
            above(explained_answer, own_answer),
        ),
    ]
    if solved is not None:
        share = figure([solved])
        made.insert(
            0,
            Claim(
                "expo_start_solves_none",
                source,
                "The start solves none of the held-out hard problems, asked plainly (pass@64).",
                "share of problems with a right answer among 64 = 0",
                {"pass_at_64": share},
                share.mean == 0.0,
            ),
        )
    return made


def start_claims(runs: Runs, _: float | None) -> list[Claim]:
    """START against GRPO: the thinking's quality by Cross-Generation, at the same training reward and at the end."""
    source = "START, arXiv 2603.20799"
    ends = {arm: [run.paired("cross_accuracy", "reward_mean")[-1] for run in runs[arm]] for arm in ("start", "grpo")}
    rewards = {arm: figure([reward for reward, _ in points]) for arm, points in ends.items()}
    thinking = {arm: figure([accuracy for _, accuracy in points]) for arm, points in ends.items()}
    level = figure([_at_reward(run, rewards["start"].mean) for run in runs["grpo"]])
    begin = figure([run.evaluations[0]["cross_accuracy"] for run in runs["grpo"]])
    words = "by Cross-Generation, with the initial policy answering it and correctness alone counting"
    return [
        Claim(
            "start_thinking_at_equal_reward",
            source,
            f"At the same training reward the thinking is better under START, {words}. grpo: where it first has the "
            "reward that START ends with.",
            ABOVE.format("start", "grpo"),
            {"start": thinking["start"], "grpo": level, "before": begin},
            above(thinking["start"], level),
        ),
        Claim(
            "start_thinking_at_the_end",
            source,
            f"After the same number of steps the thinking is better under START, {words}.",
            ABOVE.format("start", "grpo"),
            {"start": thinking["start"], "grpo": thinking["grpo"], "before": begin},
            above(thinking["start"], thinking["grpo"]),
        ),
        Claim(
            "start_reward",
            source,
            "START's second stage brings the training reward to where GRPO has it (mean since the last evaluation but "
            "one).",
            "mean of start >= mean of grpo - 0.05",
            rewards,
            rewards["start"].mean >= rewards["grpo"].mean - 0.05,
        ),
    ]


def _at_reward(run: Recorded, reward: float) -> float:
    """Cross-Generation accuracy where the training reward first reaches `reward`; the last one where it never does."""
    points = run.paired("cross_accuracy", "reward_mean")
    return next((accuracy for found, accuracy in points if found >= reward), points[-1][1])


NFT = Experiment(
    name="nft",
    title="NFT: right and wrong answers",
    start=inputs.PLAIN,
    arms=(
        Arm("grpo", "GRPO", "quickstart_nft.yaml", ("algorithm={name: grpo, clip_high: 0.28}",)),
        Arm("nft", "NFT", "quickstart_nft.yaml"),
        Arm("rft", "RFT", "quickstart_nft.yaml", ("algorithm.negative_weight=0", "algorithm.prompt_weight=one")),
    ),
    claims=nft_claims,
    panels=(
        Panel("held-out accuracy", {"accuracy": "accuracy"}, ("grpo", "nft", "rft")),
        Panel("training reward", {"reward_mean": "reward"}, ("grpo", "nft", "rft")),
        Panel("entropy, nats per token", {"entropy": "entropy"}, ("grpo", "nft", "rft")),
    ),
)

EXP_GRPO = Experiment(
    name="exp_grpo",
    title="ExPO: problems the start never solves",
    start=inputs.HINTS,
    arms=(
        # Without the explanations' term it is GRPO, bit for bit.
        Arm("grpo", "GRPO", "quickstart_exp_grpo.yaml", ("algorithm.explanation_weight=0",)),
        Arm("exp_grpo", "ExP-GRPO", "quickstart_exp_grpo.yaml"),
        Arm("exp_dpo", "ExP-DPO, iterative", "quickstart_exp_dpo.yaml"),
    ),
    claims=exp_grpo_claims,
    panels=(
        Panel("held-out accuracy", {"accuracy": "accuracy"}, ("grpo", "exp_grpo", "exp_dpo")),
        Panel(
            "in distribution: -log p(chain | question), ExP-GRPO",
            {"own_chain_nll": "own chain", "explanation_chain_nll": "explanation", "expert_chain_nll": "expert"},
            ("exp_grpo",),
        ),
        Panel(
            "useful: log p(answer | question, chain), ExP-GRPO",
            {
                "own_answer_log_prob": "own chain",
                "explanation_answer_log_prob": "explanation",
                "expert_answer_log_prob": "expert",
            },
            ("exp_grpo",),
        ),
    ),
    pass_at=64,
)

START = Experiment(
    name="start",
    title="START: a shortcut in the reward",
    start=inputs.SHORTCUT,
    arms=(
        Arm("grpo", "GRPO", "quickstart_start.yaml", ("algorithm={name: grpo}",)),
        Arm("start", "START", "quickstart_start.yaml"),
    ),
    claims=start_claims,
    panels=(
        Panel("training reward", {"reward_mean": "reward"}, ("grpo", "start")),
        Panel("Cross-Generation accuracy", {"cross_accuracy": "accuracy"}, ("grpo", "start")),
        Panel("Cross-Generation accuracy", {"cross_accuracy": "accuracy"}, ("grpo", "start"), over="reward_mean"),
    ),
)


def bridge_claims(runs: Runs, _: float | None) -> list[Claim]:
    """BRIDGE against what learns the same demonstrations and from as many rollouts."""
    source = "BRIDGE, arXiv 2509.06948"
    ends = {arm: finals(runs, arm, "accuracy") for arm in runs}
    goal = ends["sft_rl"].mean
    reached = {
        arm: figure([_first_at(run, goal, arm == "sft_rl") for run in runs[arm]]) for arm in ("bridge", "sft_rl")
    }
    made = [
        Claim(
            f"bridge_{other}",
            source,
            f"BRIDGE ends with a higher held-out accuracy than {words}, after as many rollouts.",
            ABOVE.format("bridge", other),
            {"bridge": ends["bridge"], other: ends[other]},
            above(ends["bridge"], ends[other]),
        )
        for other, words in (
            ("rl", "reinforcement alone"),
            ("alternating", "steps of one and the other in turns"),
            ("sft_rl", "demonstrations first and then reinforcement"),
        )
    ]
    made.append(
        Claim(
            "bridge_sooner",
            source,
            "BRIDGE comes in fewer steps to the accuracy that demonstrations and then reinforcement end with (steps up "
            "to the first evaluation there, those on demonstrations counted; one more than all where it never does).",
            "mean of bridge < mean of sft_rl",
            reached,
            reached["bridge"].mean < reached["sft_rl"].mean,
        )
    )
    return made


def _first_at(run: Recorded, accuracy: float, after_demonstrations: bool) -> float:
    """Steps up to the first evaluation with that accuracy, after as many on demonstrations alone."""
    points = run.curve("accuracy")
    last = float(points[-1][0])
    steps = next((float(step) for step, found in points if found >= accuracy), last + 1)
    return steps + last * (after_demonstrations or steps > last)


#: Without what only BRIDGE has.
_PLAIN = ("data.demonstrations=null", "batch.demonstrations=null", "adapter={}")
_GRPO = ("algorithm={name: grpo, clip_high: 0.28}", *_PLAIN)
#: As many steps, with as many demonstrations each, as BRIDGE makes.
_SFT = ("algorithm=sft", "data.path=data/quickstart_kinds/demonstrations.jsonl", *_PLAIN)
_ALTERNATING = "algorithm={name: bridge, shadow: none, rl_weight: 1, rl_weight_schedule: alternating, clip_high: 0.28}"
_BRIDGE_ARMS = (
    Arm("rl", "RL alone", "quickstart_bridge.yaml", _GRPO),
    Arm("sft_rl", "SFT, then RL", "quickstart_bridge.yaml", _GRPO, _SFT),
    Arm("alternating", "alternating", "quickstart_bridge.yaml", (_ALTERNATING, "adapter={}")),
    Arm("bridge", "BRIDGE", "quickstart_bridge.yaml"),
)
_BRIDGE_PANELS = (
    Panel("held-out accuracy", {"accuracy": "accuracy"}, tuple(arm.name for arm in _BRIDGE_ARMS)),
    Panel("training reward", {"reward_mean": "reward"}, tuple(arm.name for arm in _BRIDGE_ARMS)),
    Panel("cooperative gain, BRIDGE", {"cooperative_gain": "gain"}, ("bridge",)),
)

BRIDGE = Experiment(
    name="bridge",
    title="BRIDGE: demonstrations of two kinds of problems in three",
    start=inputs.KINDS,
    arms=_BRIDGE_ARMS,
    claims=bridge_claims,
    panels=_BRIDGE_PANELS,
)

BRIDGE_FLIPPED = Experiment(
    name="bridge_flipped",
    title="BRIDGE, where a fifth of the rewards are flipped",
    start=inputs.KINDS,
    arms=tuple(
        replace(arm, overrides=(*arm.overrides, "reward.kind=compare.noise:flipped", "evaluation.reward={kind: boxed}"))
        for arm in _BRIDGE_ARMS
    ),
    claims=bridge_claims,
    panels=_BRIDGE_PANELS,
)


def attnrl_claims(runs: Runs, _: float | None) -> list[Claim]:
    """AttnRL against GRPO and TreeRL after as many generated tokens, and against itself without each of its parts."""
    source = "AttnRL, arXiv 2509.26628"
    budget = min(run.by_tokens("accuracy")[-1][0] for several in runs.values() for run in several)
    ends = {arm: figure([_at_tokens(run, budget) for run in several]) for arm, several in runs.items()}
    made = [
        Claim(
            f"attnrl_{other}",
            source,
            f"After as many generated tokens ({budget / 1e6:.2f} million) AttnRL has a higher held-out accuracy than "
            f"{words}.",
            ABOVE.format("attnrl", other),
            {"attnrl": ends["attnrl"], other: ends[other]},
            above(ends["attnrl"], ends[other]),
        )
        for other, words in (
            ("grpo", "GRPO"),
            ("treerl", "TreeRL"),
            ("entropy", "with branch points by entropy"),
            ("unfiltered", "without leaving easy problems out"),
            ("uniform", "with all first samples expanded"),
        )
    ]
    goal = min(ends["grpo"].mean, ends["treerl"].mean)
    spent = {arm: figure([_tokens_to(run, goal) / 1e6 for run in runs[arm]]) for arm in ("attnrl", "treerl", "grpo")}
    made.append(
        Claim(
            "attnrl_sooner",
            source,
            f"AttnRL comes with fewer generated tokens (millions) to an accuracy of {goal:.2f}, that of the lower of "
            "GRPO and TreeRL at the end.",
            "mean of attnrl < mean of treerl, and of grpo",
            spent,
            spent["attnrl"].mean < min(spent["treerl"].mean, spent["grpo"].mean),
        )
    )
    shares = {arm: means(runs, arm, "signal_share") for arm in ("attnrl", "treerl", "grpo")}
    made.append(
        Claim(
            "attnrl_signal",
            source,
            "More of the groups that AttnRL learns from have unlike rewards, in the mean over the run.",
            ABOVE.format("attnrl", "treerl") + ", and grpo's",
            shares,
            above(shares["attnrl"], shares["treerl"]) and above(shares["attnrl"], shares["grpo"]),
        )
    )
    return made


def _at_tokens(run: Recorded, tokens: float) -> float:
    """Accuracy when so many tokens were generated, on the line between two evaluations."""
    points = run.by_tokens("accuracy")
    for (before, low), (after, high) in pairwise(points):
        if before <= tokens <= after and after > before:
            return low + (high - low) * (tokens - before) / (after - before)
    return points[-1][1]


def _tokens_to(run: Recorded, accuracy: float) -> float:
    """Generated tokens up to the first evaluation with that accuracy; all where there is none."""
    points = run.by_tokens("accuracy")
    return next((tokens for tokens, found in points if found >= accuracy), points[-1][0])


def _attnrl(**changes: object) -> str:
    """The algorithm of configs/quickstart_attnrl.yaml, changed."""
    table = {"name": "attnrl", "gap": 4, "attention": "{distance: 1}", "kl_coefficient": 0.0} | changes
    words = (f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in table.items())
    return f"algorithm={{{', '.join(words)}}}"


#: Without what only branching by attention has.
_ENTROPY = "algorithm={{name: attnrl, branching: entropy, kl_coefficient: 0.0{}}}"
_CONFIG = "quickstart_attnrl.yaml"
_ATTNRL_ARMS = (
    # As many samples of a prompt as make the tokens of a tree.
    Arm(
        "grpo",
        "GRPO",
        _CONFIG,
        ("algorithm={name: grpo, clip_high: 0.28, dual_clip: 3.0}", "rollout.group_size=16", "rollout.ahead=0"),
    ),
    Arm(
        "treerl",
        "TreeRL",
        _CONFIG,
        (_ENTROPY.format(", expansion: all, drop_easy: false, adapt: 0"), "rollout.ahead=0"),
    ),
    Arm("entropy", "by entropy", _CONFIG, (_ENTROPY.format(", attention: {distance: 1}"),)),
    Arm("unfiltered", "no filter", _CONFIG, (_attnrl(drop_easy=False),)),
    Arm("uniform", "all expanded", _CONFIG, (_attnrl(expansion="all"),)),
    Arm("attnrl", "AttnRL", _CONFIG),
)

ATTNRL = Experiment(
    name="attnrl",
    title="AttnRL: slips in long chains",
    start=inputs.SLIPS,
    arms=_ATTNRL_ARMS,
    claims=attnrl_claims,
    panels=(
        Panel("held-out accuracy", {"accuracy": "accuracy"}, ("grpo", "treerl", "attnrl"), over=TOKENS),
        Panel("share of groups with a signal", {"signal_share": "share"}, ("grpo", "treerl", "attnrl")),
        Panel(
            "held-out accuracy without a part",
            {"accuracy": "accuracy"},
            ("entropy", "unfiltered", "uniform", "attnrl"),
            over=TOKENS,
        ),
    ),
)

EXPERIMENTS = {experiment.name: experiment for experiment in (NFT, EXP_GRPO, START, BRIDGE, BRIDGE_FLIPPED, ATTNRL)}
