"""The errors of the model side."""


class UnsupportedModel(ValueError):
    """A model that cannot be served; the message is one sentence with the reason."""


class UnsupportedAttention(UnsupportedModel):
    """An attention that was asked for by name and is not there, or cannot serve the model.

    The message is one sentence that names the argument and the key.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"attention={name} was asked for (model.attention of a job), but {reason}: choose another, or leave it at "
            "auto."
        )
