"""The process that keeps a replica's environments: it imports the class, and forks a process for every sample.

So a call that hangs, dies or holds Python's lock costs its own sample alone, and calls that wait overlap. A process
whose sample has come to its end serves the next; no more are there at a time than the run allows, those included that
still end a sample. `main` is what `megarl.environments.workers` starts; it never runs the user's code itself, beyond
importing it.

Lines are JSON. First line out: `{"ready": traits}` or `{"refused": why}`. Requests: `["start", sample, seed, prompt]`,
`["turn", sample, said, verdict...]`, `["end", sample]`. Replies: `{"sample": number, "given": ...}`, or with `failed`,
the failure's counter, and `seen`, which continues a sentence about it, in place of `given`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from megarl.config import user_code
from megarl.environments.base import (
    BAD_REPLY,
    DIED,
    RAISED,
    TIMED_OUT,
    BadReply,
    checked_prompt,
    checked_reply,
    environment_class,
    traits_of,
)
from megarl.parallel.helper import BACKSTOP_FACTOR, Deadline
from megarl.parallel.helping import ENDING, backstop, send, take_pipes
from megarl.records import Prompt


def main(kind: str, arguments: str, time_limit: str, workers: str) -> int:
    """Serve until standard input closes. The exit status is 1 where `kind` leads to no class that can be used."""
    requests, replies = take_pipes()
    try:
        found = environment_class(kind)
        traits = traits_of(found)
    except Exception as error:
        why = str(error) if isinstance(error, user_code.Unusable) else user_code.described(error)
        send(replies, {"refused": why})
        return 1
    send(replies, {"ready": dataclasses.asdict(traits)})
    # What was imported is shared with the forked processes as long as nothing writes to it.
    gc.collect()
    gc.freeze()
    _Keeper(found, json.loads(arguments), float(time_limit), int(workers), requests.buffer, replies.buffer).serve()
    return 0


@dataclass(slots=True)
class _Seat:
    """A forked process and the sample whose environment is in it; `deadline` is that of its call, None between."""

    pid: int
    pipe: socket.socket
    sample: int | None = None
    deadline: Deadline | None = None
    received: bytes = b""


class _Keeper:
    def __init__(
        self, found: type, arguments: dict[str, Any], limit: float, most: int, requests: BinaryIO, replies: BinaryIO
    ) -> None:
        self._class, self._arguments, self._limit, self._most = found, arguments, limit, most
        self._requests, self._replies = requests.fileno(), replies.fileno()
        # Whoever asks may write before reading: neither must wait for the other.
        os.set_blocking(self._replies, False)
        self._seats: dict[int, _Seat] = {}
        self._by_sample: dict[int, _Seat] = {}
        self._idle: list[_Seat] = []
        self._starts: dict[int, list[Any]] = {}
        """Requests to start with a sample that wait for a process, in their order."""
        self._outgoing = b""

    def serve(self) -> None:
        """Serve until the requests end, then end every process."""
        received = b""
        while True:
            for event in self._wait():
                if event == self._requests:
                    data = os.read(self._requests, 1 << 16)
                    if not data:
                        for seat in list(self._seats.values()):
                            self._remove(seat)
                        return
                    *lines, received = (received + data).split(b"\n")
                    for line in lines:
                        self._take(json.loads(line))
                elif event in self._seats:
                    self._hear(self._seats[event])
            for seat in [one for one in self._seats.values() if one.deadline is not None and one.deadline.passed()]:
                # On a crowded machine it may have replied since.
                replied, _, _ = select.select([seat.pipe], [], [], 0)
                self._hear(seat) if replied else self._fail(seat, TIMED_OUT)
            while self._starts and (self._idle or len(self._seats) < self._most):
                sample = next(iter(self._starts))
                self._ask(self._seat(sample), self._starts.pop(sample))
            self._flush()

    def _wait(self) -> list[int]:
        """Descriptors that have something to say, or nothing at a deadline."""
        poll = select.poll()
        poll.register(self._requests, select.POLLIN)
        if self._outgoing:
            poll.register(self._replies, select.POLLOUT)
        for descriptor in self._seats:
            poll.register(descriptor, select.POLLIN)
        deadlines = [seat.deadline.at for seat in self._seats.values() if seat.deadline is not None]
        timeout = None if not deadlines else max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1
        return [descriptor for descriptor, _ in poll.poll(timeout)]

    def _take(self, request: list[Any]) -> None:
        kind, sample = request[:2]
        if kind == "start":
            self._starts[sample] = request
        elif sample in self._starts:  # its end
            del self._starts[sample]
        elif sample in self._by_sample:
            self._ask(self._by_sample[sample], request)
        elif kind == "turn":  # its process has died since, or its sample has failed
            self._reply({"sample": sample, "failed": DIED, "seen": "ended its process between two calls"})

    def _seat(self, sample: int) -> _Seat:
        """A process for a sample's environment."""
        seat = self._by_sample[sample] = self._idle.pop() if self._idle else self._fork()
        seat.sample = sample
        return seat

    def _ask(self, seat: _Seat, request: list[Any]) -> None:
        kind, sample = request[:2]
        if kind == "end" and seat.deadline is not None:  # nobody waits for its call any more
            self._remove(seat)
            return
        seat.deadline = Deadline(seat.pid, self._limit)
        with contextlib.suppress(OSError):  # that it is gone is heard next
            seat.pipe.sendall(json.dumps([kind, *request[2:]]).encode() + b"\n")
        if kind == "end":
            del self._by_sample[sample]
            seat.sample = None

    def _hear(self, seat: _Seat) -> None:
        try:
            data = seat.pipe.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            # Between two calls its end is heard of by the next one.
            self._fail(seat, DIED)
            return
        *lines, seat.received = (seat.received + data).split(b"\n")
        for line in lines:
            seat.deadline = None
            if seat.sample is None:
                self._idle.append(seat)
            else:
                self._reply({"sample": seat.sample} | json.loads(line))

    def _fail(self, seat: _Seat, counter: str) -> None:
        """End a process, and tell whoever waits for what its environment was asked."""
        asked, deadline = seat.sample, seat.deadline
        status = self._remove(seat)
        if asked is None or deadline is None:
            return
        if counter == DIED and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:  # its backstop
            counter = TIMED_OUT
        seen = {
            DIED: f"ended its process ({_ending(status)})",
            TIMED_OUT: f"gave no reply within {deadline.seconds:g} s",
        }
        self._reply({"sample": asked, "failed": counter, "seen": seen[counter]})

    def _remove(self, seat: _Seat) -> int:
        """End a process, with those that it has started; gives its exit status."""
        with contextlib.suppress(OSError):
            os.killpg(seat.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):  # before it had a group of its own
            os.kill(seat.pid, signal.SIGKILL)
        del self._seats[seat.pipe.fileno()]
        seat.pipe.close()
        if seat.sample is not None:
            self._by_sample.pop(seat.sample, None)
        if seat in self._idle:
            self._idle.remove(seat)
        return os.waitpid(seat.pid, 0)[1]

    def _fork(self) -> _Seat:
        mine, its = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for number in ENDING:  # ignored still, but not by the processes that an environment starts and ends
                    signal.signal(number, lambda *_: None)
                mine.close()
                for seat in self._seats.values():
                    seat.pipe.close()
                os.close(self._requests)
                os.close(self._replies)
                _serve(its, self._class, self._arguments, self._limit * BACKSTOP_FACTOR)
            finally:
                os._exit(0)
        its.close()
        seat = _Seat(pid, mine)
        self._seats[mine.fileno()] = seat
        return seat

    def _reply(self, message: dict[str, Any]) -> None:
        self._outgoing += json.dumps(message).encode() + b"\n"

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(self._replies, self._outgoing) :]


def _ending(status: int) -> str:
    return f"exit status {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else signal.Signals(os.WTERMSIG(status)).name


def _serve(pipe: socket.socket, found: type, arguments: dict[str, Any], limit: float) -> None:
    """In a forked process: one environment after the other."""
    environment: Any = None
    verdict = traits_of(found).verdict
    for line in pipe.makefile("rb"):
        kind, *rest = json.loads(line)
        reply: dict[str, Any] = {}
        with backstop(limit):
            try:
                if kind == "start":
                    _seed(rest[0])
                    environment = found(**arguments)
                    reply = {"given": checked_prompt(environment.start(_prompt(rest[1])))}
                elif kind == "turn":
                    # What the policy wrote, and the verdict for whoever wants it.
                    answered = environment.turn(*rest) if verdict else environment.turn(rest[0])
                    reply = {"given": checked_reply(answered)}
                else:
                    ended, environment = environment, None
                    if hasattr(ended, "close"):
                        ended.close()
            except BadReply as error:
                reply = {"failed": BAD_REPLY, "seen": str(error)}
            except BaseException as error:  # an exit included
                reply = {"failed": RAISED, "seen": f"raised {user_code.described(error)}"}
        pipe.sendall(json.dumps(reply).encode() + b"\n")


def _prompt(fields: dict[str, Any]) -> Prompt:
    """A prompt from its form in JSON, which has no tuples."""
    fields["token_ids"], fields["alternatives"] = tuple(fields["token_ids"]), tuple(fields["alternatives"])
    return Prompt(**fields)


def _seed(seed: int) -> None:
    """Processes that are forked would draw the same numbers, and a resumed run others."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
