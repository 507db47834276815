"""On-policy distillation in the loop: log-probs of a server reach the sequences of every rank, or leave them out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import arithmetic_run
import numpy as np
import parity
import pytest
from failing_judge import Act, Hang, JudgeServer, Status, serving

from megarl.algorithms.plan import Probe
from megarl.data.tokenizer import load_tokenizer, spread_tokens

#: The server's context in tokens: longer sequences are turned down.
CONTEXT = 24
#: Tokens of the longest sequence that the run may train on.
LONGEST = 48
PROCESSES = 4


def log_probs(tokens: list[int]) -> list[float | None]:
    """What the server makes of a sequence: of each token but the first a number that its id and place give."""
    return [None, *(-token / 64 - place / 8 for place, token in enumerate(tokens) if place)]


class Teacher:
    """Answers as `vllm serve` does; keeps all sequences waiting while it `hangs`."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        self.hangs = False

    def __call__(self, text: str, times: int) -> Act:
        tokens = [int(one) for one in text.split()]
        greeting = tokens == spread_tokens(self._tokenizer, LONGEST)
        if self.hangs and not greeting:
            return Hang()
        if len(tokens) > CONTEXT and not greeting:
            return Status(400, {"error": {"message": f"at most {CONTEXT} tokens"}})
        found = {"token_logprobs": log_probs(tokens), "tokens": [self._tokenizer.decode([one]) for one in tokens]}
        choice = {"index": 0, "text": "", "logprobs": found, "finish_reason": "length"}
        body = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        return Status(200, body)


#: Sessions of this process: an engine that is collected takes the world's process groups with it.
_SESSIONS: list[Any] = []


def session(world: Any, table: dict[str, Any]) -> Any:
    """A session of this rank."""
    from megarl.config.schema import RunConfig
    from megarl.health.stopping import Stopping
    from megarl.parallel.groups import form_grid
    from megarl.train.session import build
    from megarl.train.stops import Stops

    config = RunConfig.model_validate(table)
    _SESSIONS.append(build(config, world, form_grid(config.parallel, config.seed), Stops(Stopping(config.health))))
    return _SESSIONS[-1]


def learned(world: Any, table: dict[str, Any], word_file: str) -> dict[str, Any]:
    """Scenario: a step's sequences as each rank has them, what was counted and logged, and what probes find; then a
    server that is not there any more, and a run that has to stop while it waits. The file `word_file` tells the server
    what to do."""
    from megarl.errors import MegarlError
    from megarl.train.loop import run_step
    from megarl.train.probes import probed
    from megarl.train.rollouts import roll_out
    from megarl.train.selection import trainable
    from megarl.train.values import add_log_probs

    made = session(world, table)
    plan = made.algorithm.plan(1)
    rollouts = roll_out(made, plan, 1)
    batches, totals, *_ = trainable(made, rollouts, 1)
    asked = [s for batch in batches for s in batch]
    counters = add_log_probs(made, batches)
    found = made.policy.accumulate(batches[0], made.algorithm.objectives, totals[0], old_is_current=True)["policy"]
    made.policy.step()
    kept = [s for batch in batches for s in batch]
    opinion = Probe("opinion", lambda log_probs_T, _: [log_probs_T.sum(), len(log_probs_T)], "teacher", most=2)
    with mock.patch.object(made.algorithm, "probes", lambda step: (opinion, replace(opinion, name="again"))):
        measured = probed(made, rollouts, 1).kept
    with mock.patch.object(made.algorithm, "probes", lambda step: (replace(opinion, most=1),)):
        refused = ""
        try:
            probed(made, rollouts, 1)
        except MegarlError as error:
            refused = f"{type(error).__name__}: {error}"
    made.progress.step = 1
    made.recorder.open()
    line = run_step(made, 2)
    result = {"asked": asked, "kept": kept, "counters": counters, "means": found.means, "line": line, "raised": []}
    result["probed"] = {group.number: dict(group.answers[0].measured) for group in measured.groups}
    result |= {"seen": dict(measured.counters), "refused": refused}
    for word in ("gone", "hang"):
        if world.is_first:
            Path(word_file).write_text(word)
            while Path(word_file).read_text() == word:
                time.sleep(0.02)
        if word == "hang" and made.grid.reports:
            made.stops._stopping.request("a test", 0.0)
        try:
            add_log_probs(made, [list(kept)])
        except MegarlError as error:
            result["raised"].append((type(error).__name__, str(error)))
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("opd")
    arithmetic_run.write_inputs(made)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Two replicas of two pipeline stages; of the first the second rank that is last in it asks."""
    import threading

    teacher, word_file = Teacher(folder / "tokenizer"), folder / "word"
    with serving(teacher) as server:
        table = {
            "name": "run",
            "runs_dir": str(folder / "runs"),
            "steps": 5,
            "precision": "fp32",
            "model": {"path": str(folder / "model")},
            "algorithm": {"name": "opd", "teacher": {"server": settings_of(server)}},
            "parallel": {"processes": PROCESSES, "pipeline": 2},
            "data": {"path": str(folder / "data/train.jsonl"), "answer_column": "answer", "max_prompt_tokens": 32},
            "rollout": {"group_size": 1, "max_tokens": 16, "kv_cache_gib": 0.02, "keep_unfinished": False},
            "reward": {"kind": "boxed"},
            "batch": {"prompts": 24, "tokens_per_microbatch": 192},
            "optimizer": {"lr": 1e-3},
            "logging": {"tensorboard": False},
        }
        over = threading.Event()

        def change() -> None:
            """Does with the server what the ranks ask for by the file."""
            while not over.wait(0.02):
                word = word_file.read_text() if word_file.exists() else ""
                teacher.hangs = word.startswith("hang")
                if word == "gone":
                    server.stop()
                if word == "hang":
                    server.start()
                if word in ("hang", "gone"):
                    word_file.write_text(f"{word} now")

        helper = threading.Thread(target=change)
        helper.start()
        try:
            yield parity.run_world("test_opd_run", "learned", PROCESSES, table, str(word_file))
        finally:
            over.set()
            helper.join()


def settings_of(server: JudgeServer) -> dict[str, Any]:
    manners = {"time_limit": 30.0, "patience": 0.5, "retries": 0, "max_failed_share": 0.95, "concurrency": 4}
    return {"url": server.url, "model": "m", **manners}


def test_every_rank_of_a_replica_has_the_servers_log_probs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["kept"]
        for one in rank["kept"]:
            wanted = np.array(log_probs(one.tokens.tolist())[1:], np.float32)[one.positions - 1]
            np.testing.assert_array_equal(one.log_probs_under["teacher"], wanted)


def test_sequences_without_log_probs_are_left_out_on_every_rank_and_counted(ranks: list[dict[str, Any]]) -> None:
    shares = [[one.tokens.tolist() for one in rank["asked"]] for rank in ranks]
    # Stages of a replica are half a world apart.
    assert shares[0] == shares[2] and shares[1] == shares[3] and shares[0] != shares[1]
    for rank, share in zip(ranks, shares, strict=True):
        assert [one.tokens.tolist() for one in rank["kept"]] == [one for one in share if len(one) <= CONTEXT]
    everything = shares[0] + shares[1]
    lost = sum(len(one) > CONTEXT for one in everything)
    assert 0 < lost < len(everything) == 24
    # The greetings of the two that ask, and a request for each sequence.
    wanted = {"teacher_requests": 26, "teacher_error": lost}
    assert [rank["counters"] for rank in ranks] == [wanted] * PROCESSES


def test_a_probe_under_a_served_set_asks_the_server(ranks: list[dict[str, Any]]) -> None:
    """A group is dropped where it is not answered; what a probe may not find ends the step on all ranks."""
    wanted = {}
    for one in ranks[0]["asked"] + ranks[1]["asked"]:
        if len(one.tokens) <= CONTEXT:
            values = np.array(log_probs(one.tokens.tolist())[1:], np.float32)[one.positions - 1]
            wanted[one.group] = (float(values.sum()), float(len(values)))
    lost = 24 - len(wanted)
    for rank in ranks:
        assert rank["probed"] == {number: {"opinion": found, "again": found} for number, found in wanted.items()}
        counted = {"groups_dropped": lost, "groups_unmeasured": lost, "teacher_error": lost}
        # Asked once for both.
        assert rank["seen"] == counted | {"teacher_requests": 24}
        assert rank["refused"] == (
            "TrainingStopped: probe 'opinion' with 2 numbers of one sample: must find 1 at most, since every rank gets "
            "them. Fix: reduce what is measured further, or set Probe.most to what credit needs."
        )


def test_a_step_logs_what_was_counted(ranks: list[dict[str, Any]]) -> None:
    line = ranks[0]["line"]
    assert line["counters"]["teacher_requests"] == 24
    assert line["teacher_kl"] != 0 and line["loss"] != 0 and line["grad_norm"] > 0
    assert line["seconds"]["teacher_log_probs"] > 0
    assert line["clip_share"] is None


def test_means_are_over_all_that_is_trained(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["means"] == ranks[0]["means"] for rank in ranks)
    means = ranks[0]["means"]
    assert means["ratio_mean"] <= 1.0 and "teacher_kl" in means


def test_a_run_that_has_to_stop_and_one_whose_server_is_gone_end_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (ended, sentence), (stopped, words) = rank["raised"]
        assert stopped == "StopAsked" and "before it was finished" in words
        assert ended == "TrainingStopped"
        assert "gave no answer for" in sentence and "past algorithm.teacher.server.patience=0.5" in sentence
