"""The judge and the teacher against vLLM's own OpenAI-compatible server, with a tiny random model on the CPU.

What such a model writes is no verdict, unless the server's structured output makes it one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_case
from ports import free_port

from megarl.config.parameter_sets import ServedSet
from megarl.config.rewards import RewardSettings
from megarl.config.servers import LogProbServerSettings
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import Refusal
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.scorer import build_scorer
from megarl.servers.log_probs import LogProbServer

ROOT = Path(__file__).resolve().parents[1]

#: vLLM's server module, run after telling it the model's class: otherwise it starts a further process to look at it.
SERVER = """
import runpy
from megarl.rollout.arguments import register_model_class
if __name__ == "__main__":
    register_model_class("llama")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

TEXTS = ["Judge how well the response answers the question.", "Score: 10", "It is right.", "0 1 2 3 4 5 6 7 8 9"]
ITEMS = [GradingItem(f"It is {number}.", "4", question=f"What is {number} + 2?") for number in range(6)]
SCORED = {"structured_outputs": {"regex": "Score: (10|[1-9])"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "texts.txt").write_text("\n".join(TEXTS * 20))
    tokenizer, model = folder / "tokenizer", folder / "model"
    make("train_tokenizer", "--input", folder / "texts.txt", "--vocab-size", 320, "--out", tokenizer)
    # A Llama, because AutoTokenizer takes its tokenizer.json as it is.
    sizes = ["--layers", 2, "--hidden", 128, "--heads", 4, "--vocab-size", 320, "--max-positions", 2048]
    make("make_tiny_model", "--family", "llama", "--tokenizer", tokenizer, "--out", model, *sizes)
    return model


def make(tool: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """Base URL of a server that is still starting: it is waited for."""
    folder, port = model.parent, free_port()
    (folder / "server.py").write_text(SERVER)
    options = ["--model", model, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    options += ["--dtype", "float32", "--enforce-eager", "--block-size", 32, "--max-model-len", 2048]
    options += ["--max-num-seqs", 8, "--distributed-executor-backend", "uni"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "server.py", *map(str, options)],
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        # What it started ends with it, even where it did not end by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        print((folder / "server.log").read_text(errors="replace")[-4000:])


def settings(url: str, **judge: Any) -> RewardSettings:
    defaults: dict[str, Any] = {
        "url": url,
        "model": "tiny",
        "max_tokens": 24,
        "retries": 1,
        "time_limit": 120.0,
        "patience": 500.0,
        "concurrency": 4,
    }
    return RewardSettings.model_validate(
        {"kind": "judge", "low": -1.0, "high": 1.0, "max_failed_share": 1.0, "judge": defaults | judge}
    )


def ask_directly(url: str, text: str) -> tuple[str, int]:
    """What the server says about a message in the form of SCORED, past the judge, and how many tokens it has."""
    message = {"role": "user", "content": text}
    body = {"model": "tiny", "messages": [message], "temperature": 0.0, "max_tokens": 24, **SCORED}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        reply = json.load(answer)
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


@pytest.mark.parametrize("extra", [{}, {"structured_outputs": {"regex": "[a-z]{3,6}"}}])
def test_what_a_random_model_writes_is_no_reward(url: str, extra: dict[str, Any]) -> None:
    """Text up to the token limit, and whole replies of letters."""
    scorer = build_scorer(settings(url, extra=extra))
    scorer.take_counters()
    assert scorer.grade(ITEMS) == [GradedAnswer(None, "judge_unreadable")] * 6
    counters = scorer.take_counters()
    assert counters["judge_requests"] == 12
    assert counters["judge_retries"] == 6
    assert counters["judge_unreadable_replies"] == 12
    assert 12 <= counters["judge_output_tokens"] <= 12 * 24
    assert "judge_estimated_replies" not in counters


def test_scores_of_structured_output_become_rewards(url: str) -> None:
    scorer = build_scorer(settings(url, extra=SCORED, template="{question} {response}"))
    scorer.take_counters()
    graded = scorer.grade(ITEMS)
    replies = [ask_directly(url, f"{item.question} {item.text}") for item in ITEMS]
    scores = [int(words.removeprefix("Score: ")) for words, _ in replies]
    assert [one.counter for one in graded] == [None] * 6
    # 1..10 onto -1..1.
    assert [one.reward for one in graded] == pytest.approx([(score - 5.5) / 4.5 for score in scores], abs=1e-12)
    assert scorer.take_counters()["judge_input_tokens"] == sum(tokens for _, tokens in replies)
    forced = build_scorer(settings(url, extra={"structured_outputs": {"regex": "It is right\\. Score: 9/10"}}))
    assert [one.reward for one in forced.grade(ITEMS[:2])] == pytest.approx([7 / 9] * 2, abs=1e-12)


def test_a_model_that_the_server_lacks_is_refused_at_once(url: str) -> None:
    build_scorer(settings(url))  # the server is up
    with pytest.raises(
        Refusal, match=r"HTTP 404: The model `large` does not exist.*Fix: correct reward.judge.model=large"
    ):
        build_scorer(settings(url, model="large"))


def test_a_response_beyond_the_judges_context_is_not_asked_about_again(url: str) -> None:
    scorer = build_scorer(settings(url, extra=SCORED))
    scorer.take_counters()
    graded = scorer.grade([GradingItem("word " * 3000, "4"), ITEMS[0]])
    assert graded[0] == GradedAnswer(None, "judge_error")
    assert graded[1].reward is not None
    assert scorer.take_counters()["judge_requests"] == 2


def teacher(url: str) -> ServedSet:
    server = {"url": url, "model": "tiny", "time_limit": 120.0, "patience": 500.0, "retries": 0, "concurrency": 4}
    return ServedSet("teacher", LogProbServerSettings.model_validate(server), "algorithm.teacher.server")


def test_log_probs_are_those_of_the_model(url: str, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    random = np.random.default_rng(5)
    sequences = [random.integers(0, 320, length).tolist() for length in (2, 3, 17, 64, 200)]
    found = LogProbServer(teacher(url), load_tokenizer(model), 512).log_probs(sequences)
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    for tokens, values in zip(sequences, found, strict=True):
        assert values is not None
        with torch.no_grad():
            own = network(torch.tensor([tokens])).logits[0, :-1].log_softmax(1)
        wanted = own.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-4)


def test_a_sequence_beyond_the_teachers_context_stays_without_log_probs(url: str, model: Path) -> None:
    server = LogProbServer(teacher(url), load_tokenizer(model), 512)
    server.take_counters()
    found = server.log_probs([[5] * 3000, [5, 6, 7]])
    assert found[0] is None and found[1] is not None
    assert server.take_counters() == {"teacher_requests": 2, "teacher_error": 1}
    assert "HTTP 400" in (server.take_first_failure() or "")


def test_a_teacher_of_another_vocabulary_is_refused(url: str, tmp_path: Path) -> None:
    """Of as many tokens, in another order; and of more."""
    (tmp_path / "texts.txt").write_text("\n".join(["what the other tokenizer has seen is nothing like it"] * 20))
    make("train_tokenizer", "--input", tmp_path / "texts.txt", "--vocab-size", 320, "--out", tmp_path / "other")
    with pytest.raises(Refusal, match=r"model=tiny: must have this run's tokenizer, but token \d+ is '.*' there and"):
        LogProbServer(teacher(url), load_tokenizer(tmp_path / "other"), 512)
    larger = load_tokenizer(tokenizer_case.byte_level(tmp_path / "larger"))
    assert larger.vocab_size > 320
    with pytest.raises(Refusal, match=r"url=.*is of no use, .* HTTP 400: .*out of vocabulary"):
        LogProbServer(teacher(url), larger, 512)
