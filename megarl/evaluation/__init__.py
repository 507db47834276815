"""Evaluation on suites of benchmarks: what is asked, what is kept, and what the scores are."""
