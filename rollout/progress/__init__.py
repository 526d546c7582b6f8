"""What a person sees of running work: a bar on a terminal or in a notebook, plain lines elsewhere."""
