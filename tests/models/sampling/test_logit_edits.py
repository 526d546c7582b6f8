"""Token rules on logits: no wait for the device, and a history that counts as a plain recount does."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.sampling.logit_edits import logit_edits
from rollout.models.sampling.token_history import TokenHistory
from rollout.models.sampling.token_rules import token_rules
from tests.models.sampling.test_top_p import NoSynchronization


def test_edits_and_history_never_synchronize_and_count_every_token() -> None:
    cpu = torch.device("cpu")
    history = TokenHistory(cpu)
    rules = token_rules(
        allowed=range(50),
        bias={3: 1.0},
        bad_words=[[1, 2], [4, 5, 6], [7]],
        stop_ids=[9],
        min_new_tokens=3,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.1,
    )
    assert rules is not None
    empty = np.zeros(0, np.int64)
    rows = np.array([history.add(rules, np.array([1, 2, 3]), empty) for _ in range(3)])
    [edits] = logit_edits([rules] * 3, history, rows, cpu)
    drawn = torch.randint(0, 12, (40, 3), generator=torch.Generator().manual_seed(1))
    scores = torch.zeros(3, 100)
    with NoSynchronization():
        for position, tokens in enumerate(drawn):
            edits.apply(scores.clone(), torch.full((3,), position))
            edits.append(tokens)
    for row, column in zip(rows.tolist(), drawn.T, strict=True):
        entries, counts = history.ids[row], history.counts[row]
        assert {int(i): int(n) for i, n in zip(entries, counts, strict=True) if n} == {
            int(i): int((column == i).sum()) for i in column.unique()
        }
