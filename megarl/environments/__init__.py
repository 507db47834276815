"""Environments of several turns: what answers the policy while it generates."""
