"""The command line of a job: its options, its overrides, and what is wrong with them."""
