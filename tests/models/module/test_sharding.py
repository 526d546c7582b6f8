"""FSDP2's private state is read as each version of torch keeps it; a version that keeps it otherwise is refused."""

from __future__ import annotations

from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rollout.models.errors import UnsupportedModel
from rollout.models.module import sharding
from rollout.models.module.sharding import ShardedWeights


class _TrainingState(Enum):
    IDLE = auto()
    PRE_BACKWARD = auto()


class _State:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class _Sharded(nn.Module):
    """Stands for a module under FSDP2."""

    def __init__(self, **state: Any) -> None:
        super().__init__()
        self.state: Any = _State(**state)

    def _get_fsdp_state(self) -> Any:
        return self.state


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "FSDPModule", _Sharded)


@pytest.mark.parametrize("plural", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_sharded_weights_are_seen_in_every_version_of_torch(plural: bool) -> None:
    group = SimpleNamespace(is_unsharded=False)
    groups: dict[str, Any] = {"_fsdp_param_groups": [group]} if plural else {"_fsdp_param_group": group}
    module = _Sharded(_training_state=_TrainingState.IDLE, **groups)
    weights = ShardedWeights(module)
    with pytest.raises(UnsupportedModel, match="let a stream end"):
        weights.refuse_sharded()
    group.is_unsharded = True
    with weights.kept():
        assert module.state._training_state is _TrainingState.PRE_BACKWARD
    assert module.state._training_state is _TrainingState.IDLE


def test_module_without_weights_of_its_own_is_not_sharded() -> None:
    for groups in ({"_fsdp_param_groups": []}, {"_fsdp_param_group": None}):
        ShardedWeights(_Sharded(_training_state=_TrainingState.IDLE, **groups)).refuse_sharded()


@pytest.mark.parametrize(
    "state", [{"_fsdp_param_groups": []}, {"_training_state": _TrainingState.IDLE}, {}, {"_training_state": 1}]
)
def test_state_of_another_kind_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"FSDP2 of torch .* is not served") as error:
        ShardedWeights(_Sharded(**state))
    assert str(error.value).count(". ") == 0
