"""The library call: arguments, prompts of every kind, order of records."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.errors import InputError
from tests.support.tiny_models import VOCABULARY, tiny

_TEMPLATE = "{% for message in messages %}w7 {{ message['content'] }} {% endfor %}w8"


def tokenizer_of(template: str | None = _TEMPLATE) -> PreTrainedTokenizerFast:
    """Words ``w0`` to ``w198``, each one token with that id."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # type: ignore[no-untyped-call]
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny("llama"), tokenizer_of())


_SHORT = SamplingParams(max_new_tokens=6, ignore_eos=True)


def test_texts_messages_and_ids_are_the_same_prompts(engine: Engine) -> None:
    prompts: list[Any] = ["w7 w5 w6 w8", [{"role": "user", "content": "w5 w6"}], [7, 5, 6, 8]]
    batch = engine.generate(prompts, _SHORT, row_ids=["a", "b", "c"])
    assert [record.prompt_ids for record in batch] == [[7, 5, 6, 8]] * 3
    assert [record.row_id for record in batch] == ["a", "b", "c"]
    # The space that parts it from the prompt's text belongs to it.
    assert batch[0].text == "".join(f" w{i}" for i in batch[0].completion_ids if i not in (0, 2))


def test_records_come_in_prompt_order_then_sample_order(engine: Engine) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(10, 30)]
    params = [SamplingParams(n=1 + i % 3, max_new_tokens=1 + 7 * i % 11, ignore_eos=True) for i in range(20)]
    batch = engine.generate(prompts, params)
    assert [(r.row_id, r.sample) for r in batch] == [(str(i), s) for i in range(20) for s in range(1 + i % 3)]
    assert [len(r.completion_ids) for r in batch] == [1 + 7 * i % 11 for i in range(20) for _ in range(1 + i % 3)]
    padded = batch.to_padded(0)
    assert padded.completion_ids.shape == padded.logprobs.shape == (len(batch), 11)
    assert padded.prompt_ids[0].tolist() == [10, 11, 12]


def test_a_stop_string_ends_the_text_before_it_and_the_ids_with_it(engine: Engine) -> None:
    free = engine.generate(["w5 w6"], SamplingParams(max_new_tokens=20, ignore_eos=True))[0]
    words = free.text.split()
    stop = " ".join(words[8:10])
    stopped = engine.generate(["w5 w6"], SamplingParams(max_new_tokens=20, ignore_eos=True, stop=(stop,)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.completion_ids == free.completion_ids[: len(stopped.completion_ids)]
    detokenizer = engine._generation.vocabulary.read().detokenizer
    assert detokenizer.decode(stopped.completion_ids).endswith(stop)
    assert stop not in detokenizer.decode(stopped.completion_ids[:-1])


def test_a_stream_reads_prompts_as_rows_are_admitted() -> None:
    engine = Engine(tiny("llama"), None, max_rows=2)
    read: list[int] = []

    def prompts() -> Iterator[list[int]]:
        for i in range(400):
            read.append(i)
            yield [3 + i % 100, 4, 5]

    stream = engine.stream(prompts(), SamplingParams(max_new_tokens=3, ignore_eos=True))
    next(stream)
    assert len(read) < 100
    stream.close()
    assert engine.stats is not None
    assert engine.stats.samples >= 1


def test_equal_neighbours_share_their_prompt() -> None:
    engine = Engine(tiny("llama"), None)
    prompt = list(range(3, 67))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    shared = engine.generate([prompt] * 8, params).stats
    apart = engine.generate([[i, *prompt] for i in range(3, 11)], params).stats
    assert shared.prefilled_tokens == 64
    assert apart.prefilled_tokens == 8 * 65
    assert shared.peak_kv_bytes < apart.peak_kv_bytes


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        (["w5"], {"row_ids": ["a", "b"]}, "row_ids has 2 entries"),
        (["w5", "w6"], {"row_ids": ["a", "a"]}, "row_ids must differ"),
        (["w5"], {"params": [_SHORT, _SHORT]}, "params has 2 entries"),
    ],
)
def test_wrong_lists_are_refused(engine: Engine, prompts: list[str], options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        engine.generate(prompts, **options)


def test_prompts_that_need_a_missing_tokenizer_or_template_are_refused() -> None:
    bare = Engine(tiny("llama"), None)
    with pytest.raises(InputError, match="no tokenizer for texts"):
        bare.generate(["w5"])
    plain = Engine(tiny("llama"), tokenizer_of(None))
    with pytest.raises(InputError, match="no chat template"):
        plain.generate([[{"role": "user", "content": "w5"}]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"latency_budget_ms": 0.0}, "latency_budget_ms"),
        ({"min_rows": 0}, "min_rows"),
        ({"max_rows": 2, "min_rows": 3}, "max_rows"),
        ({"max_kv_bytes": 0}, "max_kv_bytes"),
        ({"reserve_fraction": 1.0}, "reserve_fraction"),
        ({"latency_budget_ms": "5"}, "latency_budget_ms is '5', but must be a number"),
        ({"max_rows": 2.5}, "max_rows is 2.5, but must be a whole number"),
        ({"min_rows": "1"}, "min_rows is '1', but must be a whole number"),
        ({"policy": "papr"}, "paper"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Engine(tiny("llama"), None, **options)


def test_no_prompts_give_an_empty_batch(engine: Engine) -> None:
    batch = engine.generate([])
    assert len(batch) == 0
    assert batch.stats.steps == 0


def test_row_ids_of_an_endless_iterator_are_read_as_far_as_there_are_prompts(engine: Engine) -> None:
    ids = (f"step-{i}" for i in count())
    assert [record.row_id for record in engine.generate([[5, 6], [7]], _SHORT, row_ids=ids)] == ["step-0", "step-1"]
    assert next(ids) == "step-2"


def test_stream_with_too_few_row_ids_raises_input_error(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=1)
    with pytest.raises(InputError, match="row_ids ends after 1 entries, but there are more prompts"):
        list(engine.stream(iter([[5], [6]]), params, row_ids=["a"]))


def test_stop_strings_without_a_tokenizer_raise_input_error() -> None:
    with pytest.raises(InputError, match="no tokenizer for stop strings"):
        Engine(tiny("llama"), None).generate([[5, 6]], SamplingParams(stop=("a",), max_new_tokens=2))


def test_a_bad_prompt_is_one_error_record(engine: Engine) -> None:
    prompts: list[Any] = [
        "w5 w6",
        None,
        [{"role": "user", "content": "w5"}],
        [1.5],
        [-1],
        "w7 \ud800",
        {"text": "w5"},
        [9],
    ]
    batch = engine.generate(prompts, _SHORT)
    assert [record.row_id for record in batch] == [str(i) for i in range(8)]
    assert [record.error_class for record in batch] == [
        *("", "bad_prompt", "", "bad_prompt", "bad_prompt", "bad_prompt", "bad_prompt", "")
    ]
    alone = engine.generate(prompts[-1:], _SHORT, row_ids=[7])
    assert alone[0].completion_ids == batch[7].completion_ids
    assert all(record.error and record.finish_reason == "error" for record in batch if record.error_class)


def test_a_row_of_a_dataset_stands_in_its_records(engine: Engine) -> None:
    batch = engine.generate([{"prompt": "w5 w6", "answer": 3}], SamplingParams(n=2, max_new_tokens=2))
    assert [(record.row, record.prompt_ids) for record in batch] == [({"answer": 3}, [5, 6])] * 2
    assert engine.generate("w5", _SHORT)[0].row == {}


def test_padded_ids_generate_as_without_padding(engine: Engine) -> None:
    ids, mask = torch.tensor([[0, 0, 5], [7, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    padded = engine.generate(ids, _SHORT, attention_mask=mask)
    assert padded.records == engine.generate([[5], [7, 5, 6]], _SHORT).records
    streamed = engine.stream(ids, {"max_new_tokens": 2, "ignore_eos": True}, attention_mask=mask, row_ids=[5, 6])
    assert sorted((record.row_id, len(record.completion_ids)) for record in streamed) == [("5", 2), ("6", 2)]


def test_threads_that_share_a_module_wait_for_each_other() -> None:
    model = tiny("llama")
    engines = [Engine(model, None) for _ in range(3)]
    prompts = [[5 + i, 6, 7] for i in range(6)]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    attention, expected = model.config._attn_implementation, engines[0].generate(prompts, params)
    with ThreadPoolExecutor(len(engines)) as threads:
        batches = list(threads.map(lambda engine: engine.generate(prompts, params), engines))
    for batch in batches:
        assert [record.completion_ids for record in batch] == [record.completion_ids for record in expected]
    assert model.config._attn_implementation == attention


def test_vocabulary_of_two_is_served() -> None:
    config = LlamaConfig(vocab_size=2, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    record = Engine(LlamaForCausalLM(config), None).generate([[0, 1]], _SHORT)[0]
    assert set(record.completion_ids) <= {0, 1}
    assert not record.error


def test_policy_that_never_prefills_ends_all_the_same() -> None:
    class Never:
        def decide(self, observation: Observation) -> Decision:
            return Decision(rows=2, prefill_tokens=0, reason="never")

    assert len(Engine(tiny("llama"), None, policy=Never()).generate([[5, 6], [7]], _SHORT)) == 2
