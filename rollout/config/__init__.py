"""The configuration of a job: its schema, its keys, its checks, and how Hydra composes it."""
