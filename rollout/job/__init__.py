"""A job: the prompts of a dataset into verified files."""
