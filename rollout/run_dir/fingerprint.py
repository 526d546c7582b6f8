"""The fingerprint of a run: every setting its results depend on, so that one directory never mixes two runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rollout.config.schema import Config, DataConfig, SamplingConfig
from rollout.errors import shorten
from rollout.models.sampling.version import SAMPLER_VERSION
from rollout.run_dir.model_digests import tokenizer_digest, weights_digest
from rollout.sampling_params import PARAMETER_NAMES, SamplingParams

_FIRST_PARAMETERS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "max_new_tokens"),
    *("stop", "stop_token_ids", "ignore_eos"),
)
_TEMPLATE_DATES = "data.template_dates"
_PROMPT_TOKENS = "data.prompt_tokens"


class Fingerprint:
    """Values by dotted key, and one digest of them all; execution settings such as the device are left out."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        # Through JSON, so that a fingerprint read back from run.json compares equal.
        self.values: dict[str, Any] = json.loads(json.dumps(dict(values), sort_keys=True))

    @property
    def template_dates(self) -> dict[str, str]:
        """What the chat template's clock gives, by format."""
        return dict(self.values.get(_TEMPLATE_DATES) or {})

    def dated(self, dates: Mapping[str, str]) -> Fingerprint:
        """Return the fingerprint of a run whose chat template writes these dates."""
        return Fingerprint(self.values | {_TEMPLATE_DATES: dict(dates)}) if dates else self

    def encoded(self, prompt_tokens: str) -> Fingerprint:
        """Return the fingerprint of a run whose prompts become these tokens.

        Args:
            prompt_tokens: their digest (`rollout.job.prompt_encoding.prompt_tokens`).
        """
        return Fingerprint(self.values | {_PROMPT_TOKENS: prompt_tokens})

    def resuming(self, begun: Fingerprint) -> Fingerprint:
        """Return the fingerprint of a job that goes on with a run.

        A run keeps the dates with which it began: a resume on the next day continues with the same prompts. The tokens
        of prompts are compared once the tokenizer is loaded, and taken to be the run's until then.
        """
        tokens = begun.values.get(_PROMPT_TOKENS)
        resumed = self.dated(begun.template_dates)
        return resumed if tokens is None or _PROMPT_TOKENS in self.values else resumed.encoded(tokens)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def fingerprint_of(
    config: Config,
    content: str,
    model: Path,
    adapter: Path | None = None,
    *,
    kept: Sequence[str] = (),
    kept_content: str = "",
    reference: Sequence[Path] = (),
    reward_source: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Compute the fingerprint of a job.

    Args:
        content: digest of the data (`rollout.data.prompts.Prompts.content`).
        model: the local folder or file of ``model.path``. Its contents are hashed, not its name: a moved or downloaded
            copy is the same model.
        adapter: the folder of its adapter.
        kept: the input columns in the output, by their names there.
        kept_content: digest of their values.
        reference: the local folder or file of ``model.reference``, and the folder of its adapter; none without one.
        reward_source: what the reward is made of (`rollout.job.reward_source.source_of`).
    """
    return Fingerprint(
        {
            "model.weights": weights_digest(model),
            "model.tokenizer": tokenizer_digest(model),
            "model.adapter": None if adapter is None else weights_digest(adapter),
            **({} if adapter is None else {"model.adapter_tokenizer": tokenizer_digest(adapter)}),
            # Runs without a reference model do not have this key, nor have earlier runs.
            **({"model.reference": [weights_digest(path) for path in reference]} if reference else {}),
            "model.dtype": config.model.dtype,
            "model.trust_remote_code": config.model.trust_remote_code,
            "data.content": content,
            "data.keep_columns": list(kept),
            "data.kept_content": kept_content,
            "data.as_chat": config.data.as_chat,
            "data.system_prompt": config.data.system_prompt,
            **_encoding_values(config.data),
            **_sampling_values(config.sampling),
            **reward_values(config.reward, reward_source or {}),
            "sampling.version": SAMPLER_VERSION,
            "output.format": config.output.format,
            "output.logprobs": config.output.logprobs,
            "output.skip_special_tokens": config.output.skip_special_tokens,
            "output.split_reasoning": config.output.split_reasoning,
            "seed": config.seed,
        }
    )


def reward_values(reward: Mapping[str, Any] | None, source: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a fingerprint that rewards depend on, besides the data."""
    # How many completions it takes at once changes no reward.
    given = reward and {key: value for key, value in reward.items() if key != "_batch_"}
    return {"reward": given, **{f"reward.{name}": value for name, value in source.items()}}


def without_reward(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the values of a fingerprint that no reward depends on."""
    return {key: value for key, value in fingerprint.values.items() if key.partition(".")[0] != "reward"}


def _encoding_values(data: DataConfig) -> dict[str, Any]:
    """Return how prompts are encoded, where it is not by default; earlier runs do not have these keys."""
    values = {
        "chat_template": _content(data.chat_template),
        "chat_template_kwargs": data.chat_template_kwargs or None,
        "tools": _content(data.tools),
        "add_special_tokens": None if data.add_special_tokens == "auto" else data.add_special_tokens,
    }
    return {f"data.{name}": value for name, value in values.items() if value is not None}


def _content(file: str | None) -> str | None:
    """Return the digest of a file's content; other values, such as the name of a template, stand for themselves."""
    path = None if file is None else Path(file).expanduser()
    return file if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def _sampling_values(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the sampling parameters that runs have always had, and the later ones that are not off.

    A run that began before a parameter existed can so be resumed.
    """
    params, off = sampling.params(), SamplingParams()
    values = {name: getattr(params, name) for name in PARAMETER_NAMES}
    return {
        f"sampling.{name}": value
        for name, value in values.items()
        if name in _FIRST_PARAMETERS or value != getattr(off, name)
    }


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the keys whose values differ, sorted."""
    return sorted(key for key in old.values.keys() | new.values.keys() if old.values.get(key) != new.values.get(key))


def describe(old: Fingerprint, new: Fingerprint) -> str:
    """Format the differing keys with their old and new values; of values that are dictionaries, their keys."""
    described = []
    for key in differences(old, new):
        was, now = old.values.get(key), new.values.get(key)
        parts: dict[str, tuple[Any, Any]] = {key: (was, now)}
        if isinstance(was, dict) and isinstance(now, dict):
            inner = (name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
            parts = {f"{key}.{name}": (was.get(name), now.get(name)) for name in inner}
        described += [f"{name} was {_format_value(a)} and is {_format_value(b)}" for name, (a, b) in parts.items()]
    return "; ".join(described)


def _format_value(value: object) -> str:
    """Format a value as JSON; a long one, such as a digest, by its beginning."""
    return shorten(json.dumps(value), longest=40, keep=13)
