"""Random calls of the whole engine at users' sizes, and what every record of them must be.

`cases` draws a call: prompts from one token to the context with weight on the edges of pages, slabs and page tables,
outputs to a thousand tokens, samples, stops, caps, policies, arrival. `check` runs it and compares each record with
transformers' ``generate`` (greedy rows) or with the same rows under another cap (sampled ones).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollout import Engine, Record, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.engine.loop import Loop
from rollout.models.arrays import ceil_div
from rollout.models.runners.select import select_strategy
from rollout.requests import Request
from tests.support.filter_edges import sampler_logprobs_agree
from tests.support.tiny_models import VOCABULARY, shallow

CONTEXT = 4096
EOS = 2

PACKED = ("llama", "gemma2", "mistral", "gpt_oss", "deepseek_v3")
PADDED = ("bloom", "gptj", "gpt_neo")
RECURRENT = ("lfm2", "falcon_h1", "qwen3_next")
#: What rounding may do to log-probabilities; recurrent states carry it on.
TOLERANCE = dict.fromkeys((*PACKED, *PADDED), 1e-5) | {"lfm2": 1e-4, "falcon_h1": 1e-4, "qwen3_next": 1e-4}

_EDGES = sorted(
    {1, 2, 3, 15, 16, 17, CONTEXT - 17, CONTEXT - 1, CONTEXT}
    | {power + off for power in (32, 64, 128, 256, 512, 1024, 2048) for off in (-1, 0, 1)}
)
_POLICIES = ("static", "memory", "sla", "paper", "predictive", "random")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a call."""

    length: int
    common: int
    """Tokens at its beginning that are those of an earlier prompt, as far as that has them."""
    params: SamplingParams
    back: int = 1
    """Which earlier prompt that is, counted back from this one."""


@dataclass(frozen=True)
class Case:
    """One call of the engine."""

    family: str
    prompts: tuple[Prompt, ...]
    policy: str
    max_rows: int
    spare_pages: int | None
    """Pages beyond what the longest row needs; None is no cap on memory."""
    late: bool
    """Whether tokens are read a step late, as on a GPU."""
    streamed: bool
    """Whether prompts come one by one while others decode."""
    reference_cap: int
    seed: int

    def prompt_ids(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        ids: list[list[int]] = []
        for prompt in self.prompts:
            before = ids[-prompt.back][: prompt.common] if ids else []
            fresh = [rng.randrange(3, VOCABULARY) for _ in range(prompt.length)]
            ids.append([*before, *fresh][: prompt.length])
        return ids


def _log_uniform(low: int, high: int) -> st.SearchStrategy[int]:
    return st.floats(math.log2(low), math.log2(high + 1), exclude_max=True).map(
        lambda power: min(high, max(low, int(2**power)))
    )


_LENGTHS = st.one_of(_log_uniform(1, CONTEXT), st.sampled_from(_EDGES))


@st.composite
def _params(draw: st.DrawFn, most_tokens: int) -> SamplingParams:
    new = min(draw(_log_uniform(1, 1000)), most_tokens)
    words = st.integers(3, VOCABULARY - 1).map("w{}".format)
    return SamplingParams(
        n=min(draw(_log_uniform(1, 17)), max(1, most_tokens // new)),
        temperature=draw(st.sampled_from([0.0, 1.0, 1.0, 0.7])),
        top_k=draw(st.sampled_from([0, 0, 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
        max_new_tokens=new,
        ignore_eos=draw(st.booleans()),
        stop=tuple(draw(st.lists(st.one_of(words, st.tuples(words, words).map(" ".join)), max_size=2))),
        stop_token_ids=tuple(draw(st.lists(st.integers(3, VOCABULARY - 1), max_size=3))),
    )


@st.composite
def cases(draw: st.DrawFn, prompt_tokens: int, output_tokens: int) -> Case:
    """A call of at most about so many tokens in prompts and outputs."""
    families = draw(st.sampled_from([PACKED, PACKED, PADDED, RECURRENT]))
    prompts: list[Prompt] = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(_LENGTHS)
        if length > prompt_tokens or output_tokens <= 0:
            break
        # Equal to an earlier prompt, a beginning in common with it, all of it and more, or nothing.
        common = draw(st.sampled_from([0, 0, CONTEXT, *_EDGES]))
        back = draw(st.integers(1, max(1, len(prompts))))
        if common == CONTEXT and prompts:
            length = prompts[-back].length + draw(st.sampled_from([0, 0, 1, 15, 16, 17, 100]))
        params = draw(_params(output_tokens))
        prompts.append(Prompt(length, common, params, back))
        prompt_tokens -= length
        output_tokens -= params.n * params.max_new_tokens
    recurrent = families is RECURRENT  # a row that is computed again sums up its states in another order
    return Case(
        family=draw(st.sampled_from(families)),
        prompts=tuple(prompts),
        policy=draw(st.sampled_from(("static", "predictive") if recurrent else _POLICIES)),
        max_rows=draw(st.sampled_from([1, 2, 3, 8, 64])),
        spare_pages=None if recurrent else draw(st.one_of(st.none(), st.integers(0, 40))),
        late=draw(st.booleans()),
        streamed=draw(st.booleans()),
        reference_cap=draw(st.sampled_from([1, 64])),
        seed=draw(st.integers(0, 1 << 16)),
    )


class _RandomPolicy:
    """Any number of rows, prefill tokens and paused rows, from a seed: no policy may change a record."""

    def __init__(self, seed: int, max_rows: int) -> None:
        self._rng = random.Random(seed)
        self._max_rows = max_rows

    def decide(self, observation: Observation) -> Decision:
        rng = self._rng
        rows = rng.choice([observation.live_rows, self._max_rows, rng.randint(1, self._max_rows)])
        return Decision(
            rows=min(max(1, rows), self._max_rows),
            prefill_tokens=rng.choice([1, 15, 17, 256, 257, 5000]),
            reason="test",
            decode_rows=rng.choice([None, None, rng.randint(1, self._max_rows)]),
        )


class _CheckedLoop(Loop):
    """Checks pages and prefix tree before every step."""

    def _observe(self) -> Observation:
        self._kv.pool.check_integrity(self._scheduler.held_pages())
        self._kv.cache.check_integrity()
        return super()._observe()


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    """The tiny model of a family, with two layers and a context of `CONTEXT` tokens."""
    return shallow(family, max_position_embeddings=CONTEXT, eos_token_id=EOS)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token id, spaces between them."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", pad_token="w0")


def check(case: Case) -> None:
    """Run a case and compare every record with what it must be.

    Raises:
        AssertionError: a record is missing, doubled, or not what it must be.
    """
    model, prompts = model_of(case.family), case.prompt_ids()
    params = [prompt.params for prompt in case.prompts]
    records = _run(case, model, prompts)
    assert [(r.row_id, r.sample) for r in records] == [
        (str(i), sample) for i, one in enumerate(params) for sample in range(one.n)
    ]
    free = [replace(one, stop=(), stop_token_ids=(), ignore_eos=True) for one in params]
    sampled = Engine(model, None, policy="static", max_rows=case.reference_cap).generate(prompts, free, seed=case.seed)
    judged: set[str] = set()
    for record, reference in zip(records, sampled, strict=True):
        i = int(record.row_id)
        room = CONTEXT - len(prompts[i])
        if room <= 0:
            assert record.error_class == reference.error_class == "prompt_too_long"
            continue
        assert record.prompt_ids == prompts[i]
        count, reason, text = _ending(prompts[i], reference.completion_ids, params[i])
        assert reference.finish_reason == "length"
        assert len(reference.completion_ids) == min(params[i].max_new_tokens, room)
        assert (record.finish_reason, record.error) == (reason, "")
        assert record.completion_ids == reference.completion_ids[:count]
        assert record.text == text
        assert len(record.logprobs) == count
        cut = replace(
            reference, completion_ids=record.completion_ids, sampler_logprobs=reference.sampler_logprobs[:count]
        )
        pairs = zip(record.logprobs, reference.logprobs, strict=False)
        worst = max((abs(a - b) for a, b in pairs), default=0.0)
        assert worst < TOLERANCE[case.family], f"log-probabilities of row {i} differ by {worst}"
        assert sampler_logprobs_agree(model, params[i], record, cut, TOLERANCE[case.family])
        if record.row_id not in judged:
            judged.add(record.row_id)
            _judge_by_the_model(case.family, model, reference, params[i].temperature)


def _run(case: Case, model: PreTrainedModel, prompts: list[list[int]]) -> list[Record]:
    """The records of the case, in the order of its prompts and samples."""
    page = select_strategy(model).kv_layout().bytes_per_page
    longest = max((min(CONTEXT, prompt.length + prompt.params.max_new_tokens) for prompt in case.prompts), default=1)
    # The pool is whole slabs, of a sixteenth of the cap each.
    pages = None if case.spare_pages is None else ceil_div(longest, 16) * 17 // 16 + 3 + case.spare_pages
    engine = Engine(
        model,
        tokenizer(),
        policy=_RandomPolicy(case.seed, case.max_rows) if case.policy == "random" else case.policy,
        max_rows=case.max_rows,
        max_kv_bytes=pages and pages * page,
    )
    params = [prompt.params for prompt in case.prompts]
    with patch("rollout.engine.generation.Loop", functools.partial(_CheckedLoop, overlap=case.late)):
        if not case.streamed:
            return list(engine.generate(prompts, params, seed=case.seed))

        def arriving() -> Iterator[Request]:
            for i, (ids, one) in enumerate(zip(prompts, params, strict=True)):
                yield Request(str(i), ids, one, case.seed)

        return sorted(engine.run(arriving()), key=lambda record: (int(record.row_id), record.sample))


def _ending(prompt: list[int], ids: Sequence[int], params: SamplingParams) -> tuple[int, str, str]:
    """How many of these tokens a completion has, why it ends, and its text; token by token, the plain way."""
    decode = functools.partial(tokenizer().decode, skip_special_tokens=True)

    def text_of(count: int) -> str:
        """What follows the prompt's text."""
        return str(decode([*prompt, *ids[:count]]))[len(decode(prompt)) :]

    for count, token in enumerate(ids, 1):
        if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
            return count, "stop", text_of(count)
        text = text_of(count) if params.stop else ""
        places = [at for at in map(text.find, params.stop) if at >= 0]
        if places:
            return count, "stop", text[: min(places)]
    return len(ids), "length", text_of(len(ids))


def _judge_by_the_model(family: str, model: PreTrainedModel, record: Record, temperature: float) -> None:
    """Compare a record with the model itself: log-probabilities with a forward, greedy tokens with ``generate``."""
    ids = torch.tensor([record.prompt_ids + record.completion_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(record.prompt_ids) - 1 : -1].float()
    own = (logits / (temperature or 1.0)).log_softmax(-1)
    chosen = own.gather(1, torch.tensor(record.completion_ids)[:, None])[:, 0]
    worst = float((chosen - torch.tensor(record.logprobs)).abs().max())
    assert worst < 5 * TOLERANCE[family], f"log-probabilities are {worst} from the model's own"
    if temperature:
        return
    prompt = torch.tensor([record.prompt_ids])
    with patch.object(model.generation_config, "eos_token_id", None):
        out = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=len(record.completion_ids),
            pad_token_id=0,
        )
    wanted = out[0, prompt.shape[1] :].tolist()
    if wanted != record.completion_ids:
        at = next(i for i, pair in enumerate(zip(wanted, record.completion_ids, strict=True)) if len(set(pair)) > 1)
        first, second = logits[at].topk(2).values.tolist()
        # Two tokens that are equally likely but for rounding may go either way.
        assert first - second < 1e-4, f"token {at} is not that of generate, by {first - second} in logits"
