"""Turns with tools: TRL's own loop runs the tools, the engine continues from ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.errors import InputError
from rollout.integrations.trl import RolloutGRPOTrainer, rollout_func
from tests.support import trl_world
from tests.support.trl_world import Calls

_TURNS = 3


def look_up(word: int) -> str:
    """
    Look a word up.

    Args:
        word: which one.

    Returns:
        What is known of it.
    """
    return f"w{50 + word} w{60 + word}"


def _calls_a_tool(ids: Any, prefix: Any, earlier: int) -> dict[str, Any]:
    """What TRL's parser would make of a completion that calls a tool in every turn but the last."""
    message: dict[str, Any] = {"role": "assistant", "content": " ".join(f"w{i}" for i in ids)}
    if earlier < _TURNS - 1:
        function = {"name": "look_up", "arguments": {"word": ids[0] % 9}}
        message["tool_calls"] = [{"type": "function", "function": function}]
    return message


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prompts as chats, and a parser that finds tool calls in what a random model says."""
    seen = {"turns": 0}

    def parse_response(tokenizer: Any, ids: Any, prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        return _calls_a_tool(ids, prefix, seen["turns"] - 1)

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", parse_response)
    seen["dataset"] = trl_world.prompts(2).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return seen


def _trainer(folder: Path, chats: Any, limit: int = 60, **changes: Any) -> Any:
    tokenizer = trl_world.tokenizer(trl_world.TEMPLATE)
    tokenizer.response_schema = {"type": "object"}
    args = trl_world.grpo_args(
        folder, max_steps=2, max_completion_length=limit, generation_kwargs={"max_new_tokens": 12}
    )
    return trl_world.trainer(
        RolloutGRPOTrainer, args, train_dataset=chats["dataset"], tools=[look_up], processing_class=tokenizer, **changes
    )


def test_three_turns_stay_in_ids_at_parity(tmp_path: Path, chats: Any) -> None:
    trainer = _trainer(tmp_path, chats)
    calls = Calls(trainer)
    held: list[int] = []

    def scoring(*args: Any, **kwargs: Any) -> Any:
        held.append(kept())
        return rewards(*args, **kwargs)

    sessions: list[Any] = []

    def kept() -> int:
        return sum(session.kv_bytes_held for session in sessions)

    rewards, trainer._calculate_rewards = trainer._calculate_rewards, scoring
    single, score = trainer._generate_single_turn, trainer._generate_and_score_completions
    outputs = []

    def turn(*args: Any, **kwargs: Any) -> Any:
        chats["turns"] += 1
        done = single(*args, **kwargs)
        sessions.append(trainer._rollout._session)
        assert kept() > 0
        return done

    def generation(inputs: Any) -> Any:
        chats["turns"] = 0
        outputs.append(score(inputs))
        return outputs[-1]

    trainer._generate_single_turn, trainer._generate_and_score_completions = turn, generation
    trainer.train()

    assert len(calls.ids) == 2 * _TURNS
    assert max(calls.distances) < 1e-5
    for earlier, later in ((0, 1), (1, 2), (3, 4), (4, 5)):
        for row, prompt in enumerate(calls.prompts[later]):
            begun = [*calls.prompts[earlier][row], *calls.ids[earlier][row]]
            assert prompt[: len(begun)] == begun
            assert prompt[len(begun)] == trl_world.TOOL
    # A turn prefills only what the tool said, and nothing is kept when the turns are over.
    assert [calls.stats[i].reused_tokens for i in (0, 3)] == [0, 0]
    for later in (1, 2, 4, 5):
        known = sum(len(ids) for ids in (*calls.prompts[later - 1], *calls.ids[later - 1]))
        assert calls.stats[later].reused_tokens == known - len(calls.ids[later])
    assert held == [0, 0]
    # No turn repeats the noise of another, and a row's log-probabilities stand over its own tokens alone.
    firsts = [tuple(ids) for call in calls.ids for ids in call]
    assert len(set(firsts)) == len(firsts)
    own = outputs[0]["tool_mask"].bool() & outputs[0]["completion_mask"].bool()
    assert (outputs[0]["sampling_per_token_logps"][own] < 0).all()
    assert (outputs[0]["sampling_per_token_logps"][~own] == 0).all()
    ids = torch.cat([outputs[0]["prompt_ids"], outputs[0]["completion_ids"]], dim=1)
    mask = torch.cat([outputs[0]["prompt_mask"], outputs[0]["completion_mask"]], dim=1)
    assert ids.shape == mask.shape


def test_a_row_that_fails_in_a_later_turn_ends_before_it(tmp_path: Path, chats: Any) -> None:
    trainer = _trainer(tmp_path, chats)
    generate, score = trainer._rollout.generate, trainer._generate_and_score_completions
    outputs = []

    def failing(*given: Any) -> Any:
        done = generate(*given)
        if trainer._rollout.keys.turn == 1:
            done = replace(done, ids=[[trl_world.EOS], *done.ids[1:]], failed=[True, *done.failed[1:]])
        chats["turns"] = trainer._rollout.keys.turn + 1
        return done

    trainer._rollout.generate = failing
    trainer._generate_and_score_completions = lambda inputs: outputs.append(score(inputs)) or outputs[-1]
    trainer.train()
    for output in outputs:
        ended = output["completion_mask"].sum(dim=1)
        assert ended[0] < ended[1:].min()
        assert output["tool_mask"][0, ended[0] - 1] == 0
        assert (output["tool_mask"][1:].gather(1, ended[1:, None] - 1) == 1).all()


def test_what_trl_would_cut_is_not_generated(tmp_path: Path, chats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Any, Any]:
        trainer = _trainer(tmp_path, chats, limit=22)
        calls, outputs = Calls(trainer), []
        single, score = trainer._generate_single_turn, trainer._generate_and_score_completions

        def turn(*args: Any, **kwargs: Any) -> Any:
            chats["turns"] += 1
            return single(*args, **kwargs)

        def generation(inputs: Any) -> Any:
            chats["turns"] = 0
            outputs.append(score(inputs))
            return outputs[-1]

        trainer._generate_single_turn, trainer._generate_and_score_completions = turn, generation
        trainer.train()
        return calls, outputs

    calls, cut = run()
    assert max(len(ids) for ids in calls.ids[1]) < 12
    monkeypatch.setattr("rollout.integrations.trl.trainer_engine._within", lambda params, tokens: params)
    calls, whole = run()
    assert max(len(ids) for ids in calls.ids[1]) == 12
    for one, other in zip(cut, whole, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        assert torch.equal(one["tool_mask"], other["tool_mask"])


def test_rollout_func_refuses_tools(tmp_path: Path, chats: Any) -> None:
    trainer = _trainer(tmp_path, chats)
    with pytest.raises(InputError, match="tools need several turns"):
        rollout_func()(["w7"], trainer)
