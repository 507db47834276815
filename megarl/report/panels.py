"""Which numbers of a run are drawn, under which title: for its picture and for its page."""

from __future__ import annotations

from typing import NamedTuple


class Panel(NamedTuple):
    """A metric of metrics.jsonl, what it is called, and the section of the page that it stands in; `pictured`: also in
    curves.png."""

    metric: str
    title: str
    section: str
    pictured: bool = True


LEARNING, POLICY, ENGINE, LENGTHS, TIME = "Learning", "Policy", "Trainer and engine", "Lengths", "Time and memory"

#: In the order in which they are drawn. Those that a run has no number of are left out.
PANELS = (
    Panel("reward_mean", "mean reward", LEARNING),
    Panel("accuracy", "accuracy", LEARNING),
    Panel("cross_accuracy", "cross-accuracy", LEARNING),
    Panel("loss", "loss", LEARNING),
    Panel("sft_loss", "loss on demonstrations", LEARNING),
    Panel("cooperative_gain", "cooperative gain", LEARNING),
    Panel("signal_share", "share of groups whose rewards differ", LEARNING, pictured=False),
    Panel("grad_norm", "gradient norm", POLICY),
    Panel("lr", "learning rate", POLICY),
    Panel("entropy", "entropy (nats)", POLICY),
    Panel("response_length_mean", "response length (tokens)", LENGTHS),
    Panel("evaluation_length_mean", "length in evaluation (tokens)", LENGTHS),
    Panel("truncated_share", "truncated share (cut at the limit)", LENGTHS),
    Panel("turns_mean", "turns per answer", LENGTHS, pictured=False),
    Panel("clip_share", "clip share", POLICY),
    Panel("reference_kl", "KL to the reference (nats)", POLICY),
    Panel("logprob_gap_mean", "|policy - engine| log-prob", ENGINE),
    Panel("logprob_gap_max", "largest |policy - engine| log-prob", ENGINE, pictured=False),
    Panel("logprob_k3", "KL between engine and policy (k3, nats)", ENGINE, pictured=False),
    Panel("importance_weight_mean", "mean importance weight", ENGINE),
    Panel("rejected_share", "rejected share", ENGINE),
    Panel("staleness_mean", "staleness of trained tokens (steps)", ENGINE, pictured=False),
    Panel("tokens_per_second", "tokens trained per second", TIME),
    Panel("padding_share", "padding share of computed tokens", TIME, pictured=False),
    Panel("weight_push/bytes", "weight pushes of a step (bytes between ranks)", TIME, pictured=False),
)
