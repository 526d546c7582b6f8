"""Turn the prompts of a library call into requests; a prompt that cannot be used becomes one that says why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from rollout.engine.prompt_arguments import GivenPrompt, check_prompt
from rollout.errors import InputError, PromptError
from rollout.length_history import LengthHistory
from rollout.requests import Request, turn_ends
from rollout.sampling_params import SamplingParams
from rollout.tokenization.prompt_encoder import PromptEncoder


def call_requests(
    prompts: Iterable[GivenPrompt],
    params: Iterator[SamplingParams],
    seed: int,
    row_ids: Iterator[str],
    *,
    encoder: PromptEncoder,
    lengths: LengthHistory,
) -> Iterator[Request]:
    """Yield a request per prompt, with the completion length that earlier calls observed for it.

    Args:
        encoder: turns prompts into token ids.
        lengths: completion lengths of earlier calls.

    Raises:
        InputError: there are fewer ids or parameters than prompts, or stop strings without a tokenizer.
    """
    for i, given in enumerate(prompts):
        row_id, row_params = next(row_ids, None), next(params)
        if row_id is None:
            raise InputError(f"row_ids ends after {i} entries, but there are more prompts.")
        if row_params.stop and not encoder.has_tokenizer:
            raise InputError("The engine has no tokenizer for stop strings: create it with one, or use stop_token_ids.")
        request = Request(row_id=row_id, prompt_ids=(), params=row_params, seed=seed, row=given.row)
        try:
            check_prompt(given.prompt)
            encoded = encoder.encode(given.with_template_columns())
        except PromptError as error:
            yield replace(request, error_class=error.error_class, error=str(error))
        else:
            yield replace(
                request,
                prompt_ids=encoded.token_ids,
                end_ids=turn_ends(encoded.turn_end_ids, row_params),
                expected_tokens=lengths.expected(encoded.token_ids),
            )
