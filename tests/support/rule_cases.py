"""Random token rules for an engine and for transformers' ``generate``, and the texts that both give."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rollout.sampling_params import SamplingParams

EOS = (2, 31, 32, 33)
NEW_TOKENS = 24


class AllowedTokens(LogitsProcessor):
    """Allow only some token ids, as vLLM's ``allowed_token_ids`` do."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = list(ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -math.inf)
        masked[:, self._ids] = scores[:, self._ids]
        return masked


class CompletionPenalties(LogitsProcessor):
    """Subtract presence and frequency penalties for tokens after the prompt, as vLLM does."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, ids in zip(scores, input_ids[:, self._prompt_tokens :], strict=True):
            counts = torch.bincount(ids, minlength=scores.shape[1])
            row -= self._frequency * counts + self._presence * (counts > 0)
        return scores


@dataclass(frozen=True)
class Case:
    """A prompt with rules, in the words of the engine and of ``generate``."""

    prompt: list[int]
    params: SamplingParams
    arguments: dict[str, Any]

    def processors(self) -> LogitsProcessorList:
        """Return the rules that ``generate`` has no argument for."""
        params, found = self.params, LogitsProcessorList()
        if params.allowed_token_ids is not None:
            found.append(AllowedTokens(params.allowed_token_ids))
        if params.presence_penalty or params.frequency_penalty:
            found.append(CompletionPenalties(len(self.prompt), params.presence_penalty, params.frequency_penalty))
        return found


def random_case(rng: random.Random, vocabulary: int, **fixed: Any) -> Case:
    """Draw a prompt and a random subset of the rules; bad words are made of tokens that a text is likely to hold."""
    prompt = [rng.randrange(3, vocabulary) for _ in range(rng.choice((1, 2, 7, 16, 17, 40, 130)))]
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if rng.random() < 0.5:
        ours["repetition_penalty"] = theirs["repetition_penalty"] = rng.choice((0.7, 1.1, 1.3, 5.0))
    if rng.random() < 0.4:
        ours["min_new_tokens"] = theirs["min_new_tokens"] = rng.randint(1, NEW_TOKENS)
    if rng.random() < 0.5:
        # Few different tokens, so that sequences of several occur. `generate` ignores words that are a single EOS id.
        some = [i for i in rng.sample(range(3, vocabulary), 12) + prompt[-3:] if i not in EOS]
        words = [[rng.choice(some) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 30))]
        ours["bad_words"] = theirs["bad_words_ids"] = words
    if rng.random() < 0.5:
        bias = {rng.randrange(vocabulary): rng.uniform(-8, 8) for _ in range(rng.randint(1, 20))}
        suppressed = rng.sample(range(3, vocabulary), rng.randint(0, 40))
        ours["logit_bias"] = bias | dict.fromkeys(suppressed, -math.inf)
        theirs["sequence_bias"] = {(i,): value for i, value in bias.items()}
        theirs["suppress_tokens"] = suppressed or None
    if rng.random() < 0.3:
        ours["presence_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.3:
        ours["frequency_penalty"] = rng.uniform(-2, 2)
    if rng.random() < 0.2:
        ours["allowed_token_ids"] = [*EOS, *rng.sample(range(3, vocabulary), rng.choice((70, 150)))]
    return Case(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, **ours | fixed), theirs)


def generated(model: PreTrainedModel, case: Case) -> list[int]:
    """Return the greedy completion of ``generate``."""
    ids = torch.tensor([case.prompt], device=model.device)
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(EOS),
        logits_processor=case.processors(),
        **case.arguments,
    )
    return output[0, len(case.prompt) :].tolist()  # type: ignore[no-any-return]


def edited_logprobs(model: PreTrainedModel, case: Case, completion: list[int]) -> torch.Tensor:
    """Return the log-probabilities of a completion under transformers' own processors and its temperature."""
    config = GenerationConfig(eos_token_id=list(EOS), **case.arguments)
    config._eos_token_tensor = torch.tensor(EOS)  # as `generate` sets it
    prompt_tokens = len(case.prompt)
    processors: Any = model._get_logits_processor(  # type: ignore[operator]
        config, input_ids_seq_length=prompt_tokens, logits_processor=case.processors(), device=str(model.device)
    )
    text = torch.tensor([case.prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits[0, prompt_tokens - 1 : -1].float()
    chosen = []
    for position, scores in enumerate(logits):
        edited = processors(text[:, : prompt_tokens + position], scores[None]) / case.params.temperature
        chosen.append(edited.log_softmax(-1)[0, completion[position]])
    return torch.stack(chosen)
