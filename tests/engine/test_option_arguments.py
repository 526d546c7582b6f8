"""Arguments that no call can use: each is refused in one sentence that names it, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.errors import InputError
from tests.engine.test_engine import tokenizer_of
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(max_new_tokens=3, ignore_eos=True)
_PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny("llama"), tokenizer_of())


class Deciding:
    """A policy that returns, or raises, what a test says."""

    def __init__(self, decide: Callable[[], Any]) -> None:
        self._decide = decide

    def decide(self, observation: Observation) -> Any:
        return self._decide()


class NoTotal:
    def free_bytes(self) -> int:
        return 1 << 30


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("headroom", [5, "x", lambda: 5, NoTotal(), NoTotal]),
        ("chat_template", [5, ["x"], b"x"]),
        ("chat_template_kwargs", [5, "x", [1]]),
        ("tools", [5, "x", [5], {"a": 1}, ["x"], [None]]),
        ("skip_special_tokens", ["yes", None, 1]),
        ("split_reasoning", ["yes", None, 0]),
        ("add_special_tokens", ["yes", None, 5]),
        ("policy", [5, None, "x", object(), int]),
        ("tracker", [5, "x"]),
        ("latency_budget_ms", ["a", True, math.nan, math.inf]),
        ("max_rows", ["x", None, 1.5]),
        ("max_kv_bytes", ["x", -1]),
        ("keep_prefixes_bytes", ["x", -1, 0.5, None, True]),
        ("attention", [5, None]),
    ],
)
def test_engine_options_of_other_types_are_refused(option: str, values: list[Any]) -> None:
    model, tokenizer = tiny("llama"), tokenizer_of()
    for value in values:
        with pytest.raises(InputError, match=option):
            Engine(model, tokenizer, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("chat_template", "{{ messages }}"), ("chat_template_kwargs", {"a": 1}), ("tools", [{"name": "f"}])],
)
def test_options_of_chats_need_a_tokenizer(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{option} needs a tokenizer"):
        Engine(tiny("llama"), None, **{option: value})


@pytest.mark.parametrize("decision", [None, 3, "x", (3, 5, "cap")])
def test_policy_that_returns_no_decision_is_named(decision: Any) -> None:
    engine = Engine(tiny("llama"), None, policy=Deciding(lambda: decision))
    with pytest.raises(InputError, match=r"policy returned .* from decide, but must return a Decision"):
        engine.generate(_PROMPTS, _PARAMS)


@pytest.mark.parametrize("field", ["rows", "prefill_tokens", "decode_rows"])
@pytest.mark.parametrize("value", ["a", 1.5, math.nan, math.inf, True])
def test_policy_that_returns_other_than_whole_numbers_is_named(field: str, value: Any) -> None:
    decision = Decision(**{"rows": 2, "prefill_tokens": 8, "reason": "cap", field: value})
    engine = Engine(tiny("llama"), None, policy=Deciding(lambda: decision))
    with pytest.raises(InputError, match=f"policy returned a Decision with {field}="):
        engine.generate(_PROMPTS, _PARAMS)


def test_policy_may_compute_with_numpy_and_raise_its_own() -> None:
    decision = Decision(np.int64(2), np.int32(8), "cap", np.int64(1))  # type: ignore[arg-type]
    assert len(Engine(tiny("llama"), None, policy=Deciding(lambda: decision)).generate(_PROMPTS, _PARAMS)) == 2

    def fail() -> None:
        raise ZeroDivisionError("the policy's own")

    with pytest.raises(ZeroDivisionError, match="the policy's own"):
        Engine(tiny("llama"), None, policy=Deciding(fail)).generate(_PROMPTS, _PARAMS)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("progress", ["yes", 5, None]),
        ("seed", [1.0, "3", None, 2**63, -(2**63) - 1, np.uint64(2**63), np.float32(1), torch.tensor(3)]),
        ("row_ids", ["a", 1.5, object(), b"ab", {"a", "b"}, {"a": 1, "b": 2}, [[1], [2]], ["a", None], ["a", "a"]]),
        ("attention_mask", ["x", 5, [1, 1], [[1, 1, 1]], [[1, 1, 1], None], torch.ones(2, 3, 1), torch.ones(3, 2)]),
        ("attention_mask", [[[1, 1, 2], [1, 1]], [["a", 1, 1], [1, 1]], [[-1e9, 0, 0], [0, 0]], [[0.5, 1, 1], [1, 1]]]),
        ("attention_mask", [[[1, 1, math.nan], [1, 1]], [[None, 1, 1], [1, 1]], [["", 1, 1], [1, 1]]]),
        ("stop_when", ["x", 5, [5]]),
        ("resume", ["x", 5, [None]]),
        ("exact", ["x", 0, 1.5, None]),
        ("params", [5, "x", [_PARAMS, None], [_PARAMS] * 3, {"tempersture": 1}, iter([])]),
        ("prompts", [None, 5, 1.5, b"x", {"w5", "w6"}, object(), np.ones((2, 2, 2), int), [{"a": 1}], {"a": 1}]),
    ],
)
def test_arguments_of_a_call_are_refused_by_name(engine: Engine, argument: str, values: list[Any]) -> None:
    for value in values:
        arguments = {"prompts": _PROMPTS, "params": _PARAMS, argument: value}
        with pytest.raises(InputError, match=argument):
            engine.generate(**arguments)
    assert len(engine.generate(_PROMPTS, _PARAMS)) == 2


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, np.int64(3), np.int32(-3), np.uint8(7)])
def test_seeds_may_be_any_whole_number_of_64_bits(engine: Engine, seed: Any) -> None:
    assert {record.seed for record in engine.generate(_PROMPTS, _PARAMS, seed=seed)} == {int(seed)}


@pytest.mark.parametrize(
    "prompt",
    [
        *([[5.0, 6]], [[-1]], [[True, 5]], [[199]], [[2**63]], [[-(2**63) - 1]], [[10**30]], [[None]], [[math.nan]]),
        *([[[5, 6]]], [[[5, 6], [7, 8]]], [[5, "a"]], [None], [{5, 6}], [object()], [np.array([5.0])], [b"x"]),
        *(['[{"role": "user", "content": '], ['[{"role": "user"}, {"x": 1}]'], [[{"from": "x", "value": "w5"}]]),
    ],
)
def test_bad_prompt_among_good_ones_is_one_error_record(engine: Engine, prompt: list[Any]) -> None:
    batch = engine.generate([[5, 6], *prompt, [8, 9]], _PARAMS)
    assert [record.error_class for record in batch] == ["", "bad_prompt", ""]
    assert batch[1].error.endswith(".")


@pytest.mark.parametrize("stored", ["{}", "[{}]", " [{}]\n"])
def test_chats_stored_as_text_are_read_as_in_jobs(engine: Engine, stored: str) -> None:
    chat = [{"role": "user", "content": "w5 w6"}]
    own = '{"role": "user", "content": "w5 w6"}'
    expected = engine.generate([chat], _PARAMS)[0].prompt_ids
    texts = [stored.replace("{}", own), {"prompt": str(chat)}, {"prompt": '[{"from": "human", "value": "w5 w6"}]'}]
    batch = engine.generate([*texts, [{"from": "human", "value": "w5 w6"}], "w5 w6"], _PARAMS)
    assert [record.prompt_ids for record in batch] == [*[expected] * 4, [5, 6]]


def test_mask_may_leave_out_ids_in_the_middle(engine: Engine) -> None:
    batch = engine.generate([[5, 6, 7], [8, 9]], _PARAMS, attention_mask=[[1, 0, 1], [True, False]])
    assert [record.prompt_ids for record in batch] == [[5, 7], [8]]


def test_closed_session_says_so(engine: Engine) -> None:
    with engine.session() as session:
        session.generate(_PROMPTS, _PARAMS)
    session.close()
    with pytest.raises(InputError, match="session is closed"):
        session.generate(_PROMPTS, _PARAMS)
    with pytest.raises(InputError, match="session is closed"):
        list(session.stream(_PROMPTS, _PARAMS))
