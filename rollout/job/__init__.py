"""A job: generate completions for the prompts of a dataset into verifiable files."""
