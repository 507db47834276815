"""Suites of benchmarks in one session: ask what is not answered yet, grade it, keep it, and score.

All of a session's engines stay up from the first benchmark to the last, and draw requests of each from one counter.
What was made survives the end of the processes: completions in a journal until they are graded, graded answers in the
benchmark's file, scores in results.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megarl.config.rewards import RULE_KINDS, RewardSettings
from megarl.config.suites import Asked
from megarl.data.dataset import LoadedPrompts, evaluation_data
from megarl.errors import Interrupted, Refusal, ScoringStopped
from megarl.evaluation.answers import AnswersFile, Place, Results, Row
from megarl.evaluation.plan import Work, session_config
from megarl.evaluation.scores import of_suite, scores
from megarl.evaluation.turns import Turn
from megarl.evaluation.votes import Group, votes
from megarl.health.run_lock import RunLock
from megarl.parallel import progress, terminal
from megarl.parallel.exchange import first_decides, from_first, gather_all, gather_to_first
from megarl.records import Key
from megarl.report.figures import clock_time
from megarl.rewards.scorer import build_scoring
from megarl.rollout.engine import Completion
from megarl.train import journal
from megarl.train.evaluation import answer_row, begin_grading, grade, outputs_of, sampling_of
from megarl.train.journal import Entries, Journal
from megarl.train.outputs import Output
from megarl.train.run import session_of
from megarl.train.run_data import RunData
from megarl.train.scoring import Grading
from megarl.train.session import Session
from megarl.train.stops import StopAsked

#: Answers that a replica grades before they are kept. Our choice: what a kill may cost.
GRADED_TOGETHER = 256
#: Seconds between two lines about how far it is. Our choice.
SAID_EVERY = 10.0


def evaluate(works: Sequence[Work]) -> None:
    """Answer every benchmark of `works`, and leave its answers and scores in its folder. Collective.

    Raises `Interrupted` where the run was asked to stop, and `TrainingStopped` where answers cannot be graded any
    more; the same command goes on from there.
    """
    config = session_config([work.asked for work in works])
    others = [work.asked.config for work in works]
    with session_of(config, evaluate_only=True, also_read=others) as session:
        locks = _Locks(sorted({work.folder for work in works}))
        gradings = _Gradings(session)
        try:
            progress.enter("step")
            with session.inference.awake():
                for work in works:
                    locks.check()
                    _evaluate_one(session, work, gradings)
        except StopAsked:
            raise Interrupted(f"the evaluation stopped at {session.stops.reason}: the same command goes on") from None
        finally:
            gradings.close()
            locks.release()


class _Locks:
    """The suites' folders, which no other evaluation may write meanwhile. The first rank holds them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._taken: list[RunLock] = []
        self._lost: list[Refusal] = []
        first_decides(lambda: self._take(folders))

    def _take(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder, say=terminal.say)
            lock.take(lost=self._lost.append)
            self._taken.append(lock)

    def check(self) -> None:
        """Raise on all ranks the `Refusal` of a folder that another evaluation has taken over, as it may where this
        one was suspended. Collective."""

        def refuse() -> None:
            for refusal in self._lost:
                raise refusal

        first_decides(refuse)

    def release(self) -> None:
        """Let others write."""
        for lock in self._taken:
            lock.release()


class _Gradings:
    """What finds rewards, for each way of grading once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._made: list[tuple[RewardSettings, Grading]] = []

    def of(self, asked: Asked, loaded: LoadedPrompts) -> Grading | None:
        """None on a rank that does not grade. Raises `Refusal` as `build_scoring`."""
        session, engine = self._session, self._session.inference.running_engine
        settings = asked.config.evaluation.reward or asked.config.reward
        if session.evaluation_grading is None:
            return None
        if settings == session.config.reward:
            return session.evaluation_grading
        for known, grading in self._made:
            if known == settings:
                return grading
        say, first = session.recorder.status, loaded.prompts[0]
        scoring = build_scoring(settings, engine.num_replicas, say, "evaluation.reward", first)
        grading = Grading(scoring, session.tokenizer, session.thinking_end, splits_thinking=False)
        self._made.append((settings, grading))
        return grading

    def close(self) -> None:
        for _, grading in self._made:
            grading.close()


def _evaluate_one(session: Session, work: Work, gradings: _Gradings) -> None:
    """One benchmark, from its problems to its scores."""
    asked = work.asked
    loaded = evaluation_data(asked.config, session.tokenizer)
    if loaded.counters["kept"] < loaded.counters["rows"]:
        session.recorder.status(f"warning: {asked.benchmark}: {loaded.sentence()}")
    data = RunData(loaded, loaded, session.data.stream)
    grading = gradings.of(asked, loaded)
    view = dataclasses.replace(session, config=asked.config, data=data, evaluation_grading=grading)
    file = AnswersFile(work.folder, asked.benchmark, work.made_for)
    kept = from_first(file.kept() if session.world.is_first else [])
    if session.world.is_first:
        file.begin(kept)
    if kept:
        session.recorder.status(f"{asked.benchmark}: {len(kept)} answers are there already")
    begin_grading(view)
    rows, counters = list(kept), Counter[str]()
    for number in range(1, asked.turns + 1):
        turn = Turn.of(view, asked, number, rows)
        new, counted = _answer(view, work, turn, file, rows)
        rows, counters = rows + new, counters + counted
    _score(view, work, file, rows, counters)
    session.stops.give_up_if(False)


def _answer(
    session: Session, work: Work, turn: Turn, file: AnswersFile, rows: Sequence[Row]
) -> tuple[list[Row], Counter[str]]:
    """What is missing of one turn: generated, graded and kept. Returns the new rows, where a further turn needs them or
    they are scored, and what was counted. Collective."""
    there = {Place.of(row) for row in rows}
    requests = [one for one in turn.requests if turn.place(one) not in there]
    name = f"{work.asked.benchmark}.{turn.number}"
    folder, engine = work.folder / "unfinished", session.inference.running_engine
    book = Journal(folder, name, work.made_for, rank=session.world.rank, writes=engine.speaks)
    entries = Entries(book, {one.index: _key(turn.place(one)) for one in requests})
    said = _Said(session, work.asked, turn.number, len(requests), len(book))
    outputs = outputs_of(session, requests, sampling_of(session), entries, said.one_more) if requests else []
    session.stops.give_up_if(engine.interrupted)
    new: list[Row] = []
    counters: Counter[str] = Counter()
    for block in _blocks(outputs):
        found, counted = _grade(session, turn, block)
        counters += counted
        # The questions of a further turn are every rank's.
        parts = gather_all(found) if turn.several else gather_to_first(found)
        together = [row for part in parts for row in part]
        new += together
        if session.world.is_first and together:
            file.add(together)
    book.close()
    if session.world.is_first:
        journal.remove(folder, name)
        with contextlib.suppress(OSError):
            # Of benchmarks that were given up something may be left.
            folder.rmdir()
    return new, counters


def _key(place: Place) -> Key:
    return Key(place.prompt, 0, place.sample, f"turn {place.turn}")


def _blocks(outputs: Sequence[Output]) -> Iterator[Sequence[Output]]:
    """A replica's outputs in blocks, as many on every rank. Collective."""
    number = max(gather_all(-(-len(outputs) // GRADED_TOGETHER)))
    for start in range(number):
        yield outputs[start * GRADED_TOGETHER : (start + 1) * GRADED_TOGETHER]


def _grade(session: Session, turn: Turn, outputs: Sequence[Output]) -> tuple[list[Row], Counter[str]]:
    """This rank's outputs as rows with their grades."""
    prompts = [turn.prompt(one.completion.index) for one in outputs]
    found = grade(session, prompts, outputs)
    settings = session.config.evaluation.reward or session.config.reward
    rows: list[Row] = []
    for prompt, output, graded in zip(prompts, outputs, found.graded, strict=False):
        place = turn.place_of(output.completion.index)
        row = answer_row(session, prompt, place.sample, output, graded, settings)
        rows.append(row | ({"turn": turn.number} if turn.several else {}))
    return rows, Counter(found.counters)


def _score(session: Session, work: Work, file: AnswersFile, rows: list[Row], counters: Counter[str]) -> None:
    """Write the benchmark's answers and scores; the first rank's work."""
    if not session.world.is_first:
        return
    assert session.data.held_out is not None
    counted = session.data.held_out.counters
    ordered = file.finish(rows)
    groups = _votes(session, work.asked, ordered)
    numbers = scores(work.asked, ordered, counted["rows"] - counted["kept"], groups, counters)
    said = {"made_for": work.made_for, "asked_pass_at": list(work.asked.pass_at)}
    results = Results(work.folder, work.asked.suite, work.model)
    known = results.known() | {work.asked.benchmark: numbers | said}
    # What was left of other weights or settings, or of a suite with more benchmarks, is not averaged with them.
    ours = {name: known[name] for name, digest in work.suite.items() if known.get(name, {}).get("made_for") == digest}
    results.write(of_suite(ours))
    file.forget_partial()
    score = numbers["score"]
    shown = "no answer has a score" if score is None else f"{100 * score:.1f} %"
    session.recorder.status(f"{work.asked.benchmark}: {shown} on {numbers['problems']} problems")


def _votes(session: Session, asked: Asked, rows: Sequence[Row]) -> list[list[Group]] | None:
    """The groups of equal answers of each problem; None where no rule says what is equal."""
    settings = asked.config.evaluation.reward or asked.config.reward
    grading = session.evaluation_grading
    if grading is None or settings.kind not in RULE_KINDS or asked.turns > 1:
        return None
    (part,) = grading.scoring.parts
    try:
        return votes(rows, part.scorer, settings.high)
    except ScoringStopped as error:
        session.recorder.status(f"warning: {asked.benchmark} has no maj@k: {error}")
        return None


class _Said:
    """Says from time to time how far a benchmark is."""

    def __init__(self, session: Session, asked: Asked, turn: int, asked_for: int, made_before: int) -> None:
        total = asked_for - made_before
        self._session, self._total = session, total
        self._name = asked.benchmark if asked.turns == 1 else f"{asked.benchmark}, turn {turn}"
        # Replicas draw alike: what one has made stands for all.
        self._replicas = session.inference.running_engine.num_replicas
        self._made, self._began, self._last = 0, time.monotonic(), time.monotonic()
        before = f", {made_before} were made before" if made_before else ""
        if total or before:
            session.recorder.status(f"{self._name}: {total} answers to make{before}")

    def one_more(self, _: Completion) -> None:
        """An answer was made here."""
        self._made += 1
        now = time.monotonic()
        if now - self._last < SAID_EVERY:
            return
        self._last = now
        share = min(1.0, self._made * self._replicas / self._total)
        left = (now - self._began) * (1 - share) / share
        self._session.recorder.status(f"{self._name}: {share:.0%} of {self._total} answers, {clock_time(left)} left")
