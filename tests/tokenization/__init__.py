"""Tests of rollout/tokenization."""
