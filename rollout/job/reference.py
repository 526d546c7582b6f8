"""Score completions under a job's reference model: a second model, whose log-probabilities stand in every record."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rollout.config.schema import ModelConfig
from rollout.errors import InputError, shorten
from rollout.records import Record
from rollout.scores import Scores

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rollout.engine.engine import Engine
    from rollout.models.loading.load import ModelSource

logger = logging.getLogger(__name__)

#: Records that are scored together: samples of one prompt end at about the same time and share its computation.
_BATCH = 64


class Reference(Protocol):
    """The part of the engine that scores."""

    def score(self, prompt_ids: Sequence[Record], *, temperature: Sequence[float]) -> Scores: ...


class ReferenceScorer:
    """Adds the reference's log-probabilities to records.

    Args:
        reference: None: records are passed on as they are.
    """

    def __init__(self, reference: Reference | None) -> None:
        self._reference = reference
        self._pending: list[tuple[Record, float]] = []
        self.failed = 0
        """Records that could not be scored."""

    def add(self, record: Record, temperature: float) -> list[Record]:
        """Take a record into the batch that waits; return it if it is not to be scored, as without a completion."""
        if self._reference is None or not record.completion_ids or record.finish_reason == "error":
            return [record]
        self._pending.append((record, temperature))
        return []

    @property
    def full(self) -> bool:
        """Whether a batch waits for `flush`."""
        return len(self._pending) >= _BATCH

    def flush(self) -> list[Record]:
        """Score the records that wait for their batch. If that is interrupted, they wait on."""
        if self._reference is None or not self._pending:
            return []
        records, temperatures = zip(*self._pending, strict=True)
        scores = self._reference.score(records, temperature=temperatures)
        self._pending = []
        return [
            self._failed(record, score.error) if score.error_class else replace(record, ref_logprobs=score.logprobs)
            for record, score in zip(records, scores, strict=True)
        ]

    def _failed(self, record: Record, reason: str) -> Record:
        self.failed += 1
        if self.failed == 1:
            logger.warning(
                "The reference model could not score row %s, sample %d (%s); its completion is kept. Further failures "
                "are counted.",
                record.row_id,
                record.sample,
                shorten(reason.rstrip("."), longest=200),
            )
        return with_reference_failure(record, reason)


_FAILED = "reference_failed"
_AS_WELL = " The reference model could not score it: "


def with_reference_failure(record: Record, reason: str) -> Record:
    """Return a record that the reference model could not score; its reward may have failed as well."""
    if record.error_class:
        return replace(record, error=f"{record.error}{_AS_WELL}{reason}")
    return replace(record, error_class=_FAILED, error=reason)


def reference_failure(error_class: str, error: str) -> str:
    """Return why the reference model could not score a record, which `with_reference_failure` put there; else empty."""
    return error if error_class == _FAILED else error.rpartition(_AS_WELL)[2] if _AS_WELL in error else ""


class LoadedReference(NamedTuple):
    """The engine of a reference model."""

    engine: Engine
    working_bytes: int
    """Memory that its calls take, which the model that generates must leave free."""


def load_reference(
    source: ModelSource, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, **options: Any
) -> LoadedReference:
    """Load the reference model of a job.

    Args:
        source: of the model that generates; dtype and device are the same.
        model: the configuration.
        tokenizer: of the model that generates.
        device: where it lies.
        options: of the engine.

    Raises:
        InputError: the model cannot be loaded or served, or its token ids mean other tokens.
    """
    # Imported here because bad input is refused without them, and they take seconds.
    from rollout.engine.engine import Engine
    from rollout.models.loading.checkpoint import has_tokenizer, locate
    from rollout.models.loading.load import load_model, load_tokenizer
    from rollout.models.module.inspect import logits_size

    path = model.reference
    assert path is not None
    with naming_reference(path):
        own = replace(source, path=path, revision=None, adapter=None)
        files = locate(path, code=source.trust_remote_code)
        if files.tokenizer.is_file() or has_tokenizer(files.tokenizer):
            check_vocabularies(path, model.path, tokenizer, load_tokenizer(own))
        module = load_model(own, device)
        size = logits_size(module)
        if size < len(tokenizer):
            raise InputError(
                f"model.reference={path} has {size} token ids, but the tokenizer of model.path={model.path} has "
                f"{len(tokenizer)}: give a model with the same tokenizer."
            )
        engine = Engine(module, None, **options)
    return LoadedReference(engine, engine.scoring_bytes)


def check_vocabularies(
    reference: str, model: str, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> None:
    """Refuse a reference model whose token ids mean other tokens.

    Raises:
        InputError: an id, or more, stands for different tokens.
    """
    own, others = tokenizer.get_vocab(), other.get_vocab()
    by_id = {number: token for token, number in others.items()}
    for token, number in sorted(own.items(), key=lambda item: item[1]):
        if by_id.get(number, token) != token:
            raise InputError(
                f"model.reference={reference} has another vocabulary than model.path={model}: id {number} is "
                f"{by_id[number]!r} and not {token!r}; give a model with the same tokenizer."
            )


@contextmanager
def naming_reference(path: str) -> Iterator[None]:
    """Turn errors of rollout.models into input errors that name the key ``model.reference``."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        message = str(error)
        # Messages about a model begin with the parameter: "path 'x' does not exist".
        message = message.removeprefix("path ") if message.startswith("path ") else f"{path!r}: {message}"
        raise InputError(f"model.reference {message}") from error
