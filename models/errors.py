"""The errors of the model side."""


class UnsupportedModel(ValueError):
    """A model that cannot be served; the message is one sentence with the reason."""
