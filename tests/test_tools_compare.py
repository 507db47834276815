"""The comparison of algorithms: what its data sets promise, its rules on figures made by hand, a tiny whole run."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.config.model_shape import model_shape_from_hf
from megarl.config.rules import broken_setting_rules
from megarl.rewards.extraction import boxed
from megarl.rewards.math import boxed_equals

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

hints = importlib.import_module("compare.hints")
kinds = importlib.import_module("compare.kinds")
noise = importlib.import_module("compare.noise")
shortcut = importlib.import_module("compare.shortcut")
claims = importlib.import_module("compare.claims")
experiments = importlib.import_module("compare.experiments")
files = importlib.import_module("compare.files")
inputs = importlib.import_module("compare.inputs")
runs = importlib.import_module("compare.runs")
pass_at = importlib.import_module("compare.pass_at")
schema = importlib.import_module("megarl.config.load")


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hints")
    hints.make(folder, seed=3, warmup=2000, train=300, heldout=100)
    return folder


@pytest.fixture(scope="module")
def shortcuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortcut")
    shortcut.make(folder, seed=3, warmup=4000, train=300, heldout=100)
    return folder


def terms(question: str) -> list[int]:
    """The numbers of "12+7-5=", signed."""
    return [int(number) for number in re.findall(r"[+-]?\d+", question.removesuffix("="))]


def thinking_and_response(solution: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?s)<think>(.*)</think>(.*)", solution)
    assert match is not None
    return match[1], match[2]


def test_a_hard_answer_counts_its_steps(hinted: Path) -> None:
    rows = files.read_rows(hinted / "train.jsonl") + files.read_rows(hinted / "heldout.jsonl")
    assert len(rows) == 400
    for row in rows:
        first, *rest = terms(row["prompt"])
        assert len(rest) == hints.HARD.steps
        assert row["answer"] == f"{first + sum(rest)}:{hints.HARD.steps}"


def test_no_question_is_in_two_files_and_experts_are_right(hinted: Path) -> None:
    parts = [files.read_rows(hinted / f"{name}.jsonl") for name in ("warmup", "train", "heldout")]
    questions = [re.match(r"[^=]*=", row["prompt"])[0] for part in parts for row in part]  # type: ignore[index]
    assert len(set(questions)) == len(questions) == 2400
    for row in parts[1] + parts[2]:
        thinking, response = thinking_and_response(row["solution"])
        steps = [step.split("=") for step in thinking.split("\n\n")]
        assert all(eval(left) == int(right) for left, right in steps)
        assert boxed(response) == row["answer"] == f"{steps[-1][1]}:{hints.HARD.steps}"


def test_the_warmup_solves_hard_problems_only_where_the_answer_is_given(hinted: Path) -> None:
    seen = {"plain easy": 0, "hinted easy": 0, "hinted hard": 0, "plain hard": 0}
    for row in files.read_rows(hinted / "warmup.jsonl"):
        question, _, hint = row["prompt"].partition("=")
        level = len(terms(question)) - 1
        name = f"{'hinted' if hint else 'plain'} {'hard' if level == hints.HARD.steps else 'easy'}"
        seen[name] += 1
        thinking, _ = thinking_and_response(row["solution"])
        shown = thinking.split("\n\n")
        assert len(shown) == (2 if name == "plain hard" else level)
        assert boxed(row["solution"]) == f"{shown[-1].split('=')[1]}:{len(shown)}"
        assert boxed_equals(row["solution"], row["answer"]) == (name != "plain hard")
        if hint:
            assert row["prompt"] == hints.TEMPLATE.replace("{prompt}", question + "=").replace(
                "{answer}", row["answer"]
            )
    assert seen == {"plain easy": 700, "hinted easy": 300, "hinted hard": 700, "plain hard": 300}


def test_the_hint_is_what_the_configurations_ask_with() -> None:
    for name in ("quickstart_exp_grpo.yaml", "quickstart_exp_dpo.yaml"):
        config = schema.load_config(ROOT / "configs" / name)
        assert config.algorithm.explanation.template == hints.TEMPLATE


def test_careful_thinking_needs_every_step(shortcuts: Path) -> None:
    rows = files.read_rows(shortcuts / "train.jsonl") + files.read_rows(shortcuts / "heldout.jsonl")
    assert len(rows) == 400
    for row in rows:
        first, *rest = terms(row["prompt"])
        reached = [first + sum(chosen) for size in range(len(rest)) for chosen in itertools.combinations(rest, size)]
        assert len(rest) == shortcut.LEVEL.steps and first + sum(rest) == int(row["answer"])
        assert min(abs(value - int(row["answer"])) for value in reached) > 1


def test_lazy_thinking_is_wrong_and_the_form_says_nothing_about_it(shortcuts: Path) -> None:
    counts = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
    for row in files.read_rows(shortcuts / "warmup.jsonl"):
        thinking, response = thinking_and_response(row["solution"])
        steps = thinking.split("\n\n")
        careful = len(steps) == shortcut.LEVEL.steps
        assert all(eval(step.split("=")[0]) == int(step.split("=")[1]) for step in steps)
        assert boxed(response) == steps[-1].split("=")[1]
        assert boxed_equals(response, row["answer"]) == careful
        counts[careful, shortcut.is_flashy(response)] += 1
    total, careful, flashy = sum(counts.values()), shortcut.CAREFUL, shortcut.FLASHY
    for (is_careful, is_flashy), count in counts.items():
        expected = (careful if is_careful else 1 - careful) * (flashy if is_flashy else 1 - flashy)
        # Four standard deviations of a share of 4000 draws.
        assert abs(count / total - expected) < 4 * (expected * (1 - expected) / total) ** 0.5


def test_the_judge_falls_for_flashy_responses_and_correctness_does_not() -> None:
    wrong, right = shortcut.response_text("3", flashy=False), shortcut.response_text("4", flashy=False)
    flashy_wrong, flashy_right = shortcut.response_text("3", flashy=True), shortcut.response_text("4", flashy=True)
    assert [shortcut.overrated(text, "4", "") for text in (wrong, right, flashy_wrong, flashy_right)] == [0, 1, 1, 1]
    assert [boxed_equals(text, "4") for text in (wrong, right, flashy_wrong, flashy_right)] == [0, 1, 0, 1]


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    for module in (hints, shortcut):
        texts = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            module.make(tmp_path / name, 60, 10, 5, seed)
            texts.append("".join(file.read_text() for file in sorted((tmp_path / name).iterdir())))
        assert texts[0] == texts[1] != texts[2]


def test_noise_is_two_standard_errors_of_the_difference() -> None:
    # Variances 0.01 and 0.04 over three seeds each: 2 sqrt((0.01 + 0.04) / 3).
    first, second = claims.figure([0.4, 0.5, 0.6]), claims.figure([0.1, 0.3, 0.5])
    assert claims.noise(first, second) == pytest.approx(0.25819888974716115)
    assert (first.mean, first.spread) == (pytest.approx(0.5), pytest.approx(0.1))
    # 0.2 above, less than the noise: neither is above, each is at least the other.
    assert not claims.above(first, second) and not claims.above(second, first)
    assert claims.at_least(second, first)
    far = claims.figure([0.75, 0.8, 0.85])
    assert claims.above(far, second) and not claims.at_least(second, far)


def test_a_single_seed_has_no_spread_and_none_is_refused() -> None:
    assert claims.figure([0.5]) == claims.Figure((0.5,), 0.5, 0.0)
    with pytest.raises(ValueError, match="at least one seed"):
        claims.figure([])


def recorded(accuracies: list[float], rewards: list[float] | None = None, **metrics: list[float]) -> Any:
    """A run's figures: one evaluation per accuracy, one step per reward; `metrics` are of steps or evaluations."""
    evaluations = [
        {"step": 5 * i, "accuracy": a} | {k: v[i] for k, v in metrics.items() if k.startswith("cross")}
        for i, a in enumerate(accuracies)
    ]
    steps = [
        {"step": i + 1, "reward_mean": r} | {k: v[i] for k, v in metrics.items() if not k.startswith("cross")}
        for i, r in enumerate(rewards or [])
    ]
    return runs.Recorded(Path("run"), tuple(steps), tuple(evaluations))


def verdicts(made: list[Any]) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in made}


def test_the_rules_on_nft() -> None:
    def of(nft: float, rft: float, grpo: float) -> dict[str, bool]:
        arms = {"nft": nft, "rft": rft, "grpo": grpo}
        made = {arm: [recorded([0.1, end - 0.01]), recorded([0.1, end + 0.01])] for arm, end in arms.items()}
        return verdicts(experiments.nft_claims(made, None))

    assert all(of(0.8, 0.7, 0.8).values())
    # Two standard errors of the difference are 0.0283 at the end, and half of it over the course.
    assert of(0.8, 0.7, 0.82)["nft_grpo_end"] and not of(0.8, 0.7, 0.84)["nft_grpo_end"]
    assert of(0.8, 0.82, 0.8)["nft_rft_end"] and not of(0.8, 0.84, 0.8)["nft_rft_end"]
    assert of(0.8, 0.82, 0.8)["nft_rft_course"] and not of(0.8, 0.84, 0.8)["nft_rft_course"]


def test_the_rules_on_expo() -> None:
    nll = {
        "own_chain_nll": [0.1],
        "explanation_chain_nll": [1.0],
        "expert_chain_nll": [3.0],
        "own_answer_log_prob": [-9.0],
        "explanation_answer_log_prob": [-0.1],
    }

    def of(
        grpo: float, exp_grpo: float, exp_dpo: float, solved: float | None = 0.0, **changes: float
    ) -> dict[str, bool]:
        measured = nll | {name: [value] for name, value in changes.items()}
        made = {
            "grpo": [recorded([0.0, grpo])],
            "exp_grpo": [recorded([0.0, exp_grpo], [0.0], **measured)],
            "exp_dpo": [recorded([0.0, exp_dpo])],
        }
        return verdicts(experiments.exp_grpo_claims(made, solved))

    assert all(of(0.0, 0.5, 0.4).values())
    assert not of(0.1, 0.5, 0.4)["expo_grpo_stays"]
    assert not of(0.0, 0.05, 0.4)["expo_leaves"]
    assert not of(0.0, 0.5, 0.05)["expo_dpo_leaves"]
    assert not of(0.0, 0.5, 0.4, solved=0.01)["expo_start_solves_none"]
    assert not of(0.0, 0.5, 0.4, expert_chain_nll=1.9)["expo_in_distribution"]
    assert not of(0.0, 0.5, 0.4, own_chain_nll=1.1)["expo_in_distribution"]
    assert not of(0.0, 0.5, 0.4, own_answer_log_prob=-0.05)["expo_useful"]


def test_the_rules_on_start() -> None:
    def of(start: float, grpo: tuple[float, float], rewards: tuple[float, ...]) -> dict[str, bool]:
        made = {
            "start": [recorded([0.3, 0.5], [0.7, 0.7, 0.8, 0.9, 0.9, 1.0], cross_accuracy=[0.3, start])],
            "grpo": [recorded([0.3, 0.5, 0.5], list(rewards), cross_accuracy=[0.3, *grpo])],
        }
        # Evaluations stand five steps apart: START ends at the mean reward of its first five steps, 0.8.
        return verdicts(experiments.start_claims(made, None))

    low_then_high = (0.4,) * 5 + (0.85,) * 5
    high_at_once = (0.8,) * 5 + (0.85,) * 5
    assert all(of(0.8, (0.4, 0.6), low_then_high).values())
    # GRPO reaches the reward 0.8 at its second evaluation, or at its first.
    assert not of(0.5, (0.4, 0.6), low_then_high)["start_thinking_at_equal_reward"]
    assert of(0.5, (0.4, 0.6), high_at_once)["start_thinking_at_equal_reward"]
    assert not of(0.5, (0.4, 0.6), high_at_once)["start_thinking_at_the_end"]
    assert of(0.8, (0.4, 0.6), low_then_high)["start_reward"]
    assert not of(0.8, (0.4, 0.6), (0.8,) * 5 + (0.86,) * 5)["start_reward"]


def test_a_curve_over_another_takes_the_steps_since_the_evaluation_before() -> None:
    run = recorded([0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6])
    assert run.paired("accuracy", "reward_mean") == [(pytest.approx(0.2), 0.2), (pytest.approx(0.6), 0.3)]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    start = {"train_rows": 40}
    request = {"config": "quickstart_nft.yaml", "overrides": ["seed=1"], "start": start}
    files.write_json(folder / "request.json", request)
    (folder / "summary.json").write_text("{}")
    assert runs.train(folder, "quickstart_nft.yaml", ["seed=1"], tmp_path, start) == 0.0
    for overrides, other in ((["seed=2"], start), (["seed=1"], {"train_rows": 41})):
        with pytest.raises(runs.RunFailed, match="other settings or from another start"):
            runs.train(folder, "quickstart_nft.yaml", overrides, tmp_path, other)


def test_a_start_of_another_recipe_is_refused(tmp_path: Path) -> None:
    small, other = inputs.Sizes(200, 40, 8, 2), inputs.Sizes(200, 40, 9, 2)
    warmed = tmp_path / "runs" / "quickstart_shortcut_warmup"
    warmed.mkdir(parents=True)
    (warmed / "summary.json").write_text("{}")
    inputs.prepare(inputs.SHORTCUT, tmp_path, small)
    made = (tmp_path / "data" / "quickstart_shortcut" / "train.jsonl").stat().st_mtime_ns
    inputs.prepare(inputs.SHORTCUT, tmp_path, small)
    assert (tmp_path / "data" / "quickstart_shortcut" / "train.jsonl").stat().st_mtime_ns == made
    with pytest.raises(runs.RunFailed, match=r"heldout_rows 8, not 9\); remove it and runs/quickstart_shortcut_warmup"):
        inputs.prepare(inputs.SHORTCUT, tmp_path, other)
    assert len({inputs.recipe(start, small)["code"] for start in (inputs.PLAIN, inputs.HINTS, inputs.SHORTCUT)}) == 3
    # The empty mark of launch/quickstart.sh means the usual sizes.
    (tmp_path / "data" / "quickstart_shortcut" / "complete").write_text("")
    inputs.prepare(inputs.SHORTCUT, tmp_path, inputs.Sizes())
    with pytest.raises(runs.RunFailed, match="heldout_rows 256, not 8"):
        inputs.prepare(inputs.SHORTCUT, tmp_path, small)


def test_pass_at_k_counts_problems_with_a_right_answer(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    source = random.Random(0)
    samples = [{"prompt_index": i % 4, "reward": float(i % 4 == 2 and i > 8)} for i in range(16)]
    source.shuffle(samples)
    files.write_rows(tmp_path / "rollouts" / "step_000001.rank_0000.jsonl", samples[:9])
    files.write_rows(tmp_path / "rollouts" / "step_000001.rank_0001.jsonl", samples[9:])
    solved = pass_at._solved(tmp_path, 4)
    assert solved == {"problems": 4, "samples": 16, "right_samples": 2, "solved_share": 0.25}


def test_the_rules_on_bridge() -> None:
    def of(bridge: float, sft_rl: float, rl: float, course: float = 0.0) -> dict[str, bool]:
        ends = {"rl": rl, "sft_rl": sft_rl, "alternating": rl, "bridge": bridge}
        made = {
            arm: [recorded([0.1, course if arm == "bridge" else 0.0, end + shift]) for shift in (-0.01, 0.01)]
            for arm, end in ends.items()
        }
        return verdicts(experiments.bridge_claims(made, None))

    assert all(of(0.8, 0.7, 0.6, course=0.75).values())
    # Two standard errors of the difference are 0.0283.
    assert of(0.73, 0.7, 0.6)["bridge_sft_rl"] and not of(0.72, 0.7, 0.6)["bridge_sft_rl"]
    assert not of(0.8, 0.7, 0.8)["bridge_rl"] and not of(0.8, 0.7, 0.8)["bridge_alternating"]
    # It comes to 0.7 at the second evaluation or at the third, the other after its steps on demonstrations, or never.
    assert of(0.8, 0.7, 0.6, course=0.7)["bridge_sooner"] and of(0.8, 0.7, 0.6)["bridge_sooner"]
    assert not of(0.6, 0.7, 0.6)["bridge_sooner"]


def test_demonstrations_cover_some_kinds_alone(tmp_path: Path) -> None:
    kinds.make(tmp_path, 300, 60, 30)
    found = {name: files.read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "heldout", "demonstrations")}
    levels = {name: sorted({row["level"] for row in rows}) for name, rows in found.items()}
    assert levels == {"train": [2, 3, 4], "heldout": [2, 3, 4], "demonstrations": [2, 3]}
    for rows in found.values():
        counts = [sum(row["level"] == level for row in rows) for level in {row["level"] for row in rows}]
        assert max(counts) - min(counts) <= 1
    questions = [row["prompt"] for rows in found.values() for row in rows]
    warmup = files.read_rows(tmp_path / "warmup.jsonl")
    assert len({*questions, *(row["prompt"] for row in warmup)}) == len(questions) + len(warmup) == 450
    # The warm-up gives most longer problems up after two steps, the others go on to their end.
    for row in (one for rows in found.values() for one in rows):
        assert boxed_equals(row["solution"], row["answer"]) and row["solution"].count("=") == row["level"]
    longer = [row for row in warmup if row["level"] > 2]
    whole = [row for row in longer if boxed_equals(row["solution"], row["answer"])]
    assert 0.03 < len(whole) / len(longer) < 0.2
    assert all(row["solution"].count("=") == 2 for row in longer if row not in whole)


def test_a_fifth_of_the_rewards_is_flipped() -> None:
    texts = [f"<think>{number}</think>\\boxed{{{number % 2}}}" for number in range(2000)]
    given = [noise.flipped(text, "1", "") for text in texts]
    assert given == [noise.flipped(text, "1", "") for text in texts]
    right = [float(number % 2) for number in range(2000)]
    assert 0.17 < sum(one != other for one, other in zip(given, right, strict=True)) / 2000 < 0.23


@pytest.mark.parametrize("name", ["bridge", "bridge_flipped"])
def test_every_arm_of_bridge_is_a_run(name: str) -> None:
    """With as many rollouts of the same problems, and no setting without effect."""
    fields = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"model_type": "qwen2", "intermediate_size": 384, "vocab_size": 320, "max_position_embeddings": 2048}
    shape = model_shape_from_hf(fields | sizes)
    for arm in experiments.EXPERIMENTS[name].arms:
        configs = [schema.load_config(TOOLS.parent / "configs" / arm.config, [*arm.overrides])]
        if arm.before:
            configs.append(schema.load_config(TOOLS.parent / "configs" / arm.config, [*arm.before]))
            assert configs[1].algorithm.name == "sft" and str(configs[1].data.path).endswith("demonstrations.jsonl")
        assert (configs[0].steps, configs[0].batch.prompts, configs[0].rollout.group_size) == (40, 32, 8)
        for config in configs:
            assert [str(refusal) for refusal in broken_setting_rules(config, shape)] == [], arm.name
        assert (configs[0].reward.kind == "compare.noise:flipped") == (name == "bridge_flipped")


def test_a_tiny_comparison_from_nothing_to_the_claims(tmp_path: Path) -> None:
    """Two steps per arm on one seed, through `megarl train`; asked again, no run is repeated."""
    options = "--out out --algorithms start --seeds 1"
    sizes = "--warmup-rows 200 --train-rows 40 --heldout-rows 8 --warmup-steps 2"
    changes = "--set steps=2 batch.prompts=4 rollout.group_size=2 rollout.max_tokens=48 rollout.kv_cache_gib=0.02"
    command = [sys.executable, str(TOOLS / "compare_algorithms.py"), *f"{options} {sizes} {changes}".split()]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "out"
    found = json.loads((out / "claims.json").read_text())
    assert [claim["name"] for claim in found["claims"]] == [
        "start_thinking_at_equal_reward",
        "start_thinking_at_the_end",
        "start_reward",
    ]
    assert {claim["seeds"] for claim in found["claims"]} == {1}
    for arm in ("start", "grpo"):
        lines = files.read_rows(out / "runs" / f"start_{arm}_seed1" / "metrics.jsonl")
        rewards = [line["reward_mean"] for line in lines if "reward_mean" in line]
        final = [line["cross_accuracy"] for line in lines if "cross_accuracy" in line][-1]
        assert len(rewards) == 2
        assert found["claims"][1]["figures"][arm]["per_seed"] == [final]
        assert found["claims"][2]["figures"][arm]["per_seed"] == [pytest.approx(sum(rewards) / 2)]
    assert "| claim | rule | figures | holds |" in (out / "claims.md").read_text()
    assert (out / "claims.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("was finished already") == 2
    assert json.loads((out / "claims.json").read_text()) == found
