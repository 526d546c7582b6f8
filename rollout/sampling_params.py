"""Sampling parameters of a prompt, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.errors import InputError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one prompt; a job's sampling configuration has the same names and defaults.

    ``temperature=0`` is greedy; ``top_k=0``, ``top_p=1`` and ``min_p=0`` are off. Filters apply in the
    order temperature, top-k, top-p, min-p. A completion ends at an end-of-sequence id of the model
    (unless ``ignore_eos``), at an id in ``stop_token_ids``, when its text contains a string of ``stop``,
    or after ``max_new_tokens`` tokens.

    Raises:
        InputError: a value is out of range; the message names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of at least 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop", all(self.stop), "a list of non-empty strings"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)!r}, but must be {wanted}.")


def _strings(value: object) -> tuple[str, ...]:
    """Return one string or several as a tuple, so that ``stop="\\n"`` is not split into characters."""
    return (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
