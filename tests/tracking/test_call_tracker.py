"""The tracker of an engine: the numbers of its calls arrive, and no tracker stops a call."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed, nn

from rollout import Engine, SamplingParams
from rollout.errors import InputError
from rollout.tracking.call_tracker import FOLDER
from tests.support.tiny_models import tiny

PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)


class Kept(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Keeps what it is given."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error
        self.lines: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[tuple[int | None, dict[str, Any]]]:
        return self.lines

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


def test_tracker_of_the_caller_gets_the_numbers_of_each_call(model: nn.Module) -> None:
    tracker = Kept()
    engine = Engine(model, None, tracker=tracker)
    batch = engine.generate(PROMPTS, PARAMS)
    list(engine.stream(PROMPTS[:1], PARAMS))
    (first, numbers), (second, parity), (third, streamed), _ = tracker.lines
    assert (first, second, third) == (1, 2, 3)
    assert batch.stats.parity is not None
    assert parity["rollout/parity/self_max"] == batch.stats.parity.self_max
    assert parity["rollout/parity/mean"] == batch.stats.parity.mean
    assert numbers["rollout/new_tokens"] == batch.stats.output_tokens
    assert numbers["rollout/steps"] == batch.stats.steps
    assert numbers["rollout/finish_reasons/length"] == len(batch)
    assert streamed["rollout/finish_reasons/length"] == 1


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), SystemExit("no route to host")])
def test_tracker_that_fails_is_said_once_and_left_out(
    model: nn.Module, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    tracker = Kept(error)
    engine = Engine(model, None, tracker=tracker)
    for _ in range(2):
        assert len(engine.generate(PROMPTS, PARAMS)) == len(PROMPTS)
    assert len(tracker.lines) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"The tracker failed, and generation goes on without it: {type(error).__name__}: no route to host."
    ]


def test_numbers_arrive_when_a_stream_is_left_early(model: nn.Module) -> None:
    tracker = Kept()
    stream = Engine(model, None, tracker=tracker).stream(PROMPTS, [PARAMS, SamplingParams(max_new_tokens=90)])
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert sum(values["rollout/steps"] for _, values in tracker.lines) == PARAMS.max_new_tokens


def test_named_tracker_has_a_run_that_ends_with_the_engine(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = Engine(model, None, tracker="tensorboard")
    tokens = [engine.generate(PROMPTS[:count], PARAMS).stats.output_tokens for count in (2, 1)]
    del engine
    gc.collect()
    (folder,) = (tmp_path / FOLDER).iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("new_tokens")] == tokens


def test_only_the_first_rank_has_a_named_tracker(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert len(Engine(model, None, tracker="tensorboard").generate(PROMPTS, PARAMS)) == len(PROMPTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracker", [None, "none"])
def test_without_tracker_no_step_is_reported(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tracker: str | None
) -> None:
    monkeypatch.setattr("rollout.engine.step_reporter.StepReport", None)
    assert len(Engine(model, None, tracker=tracker).generate(PROMPTS, PARAMS)) == len(PROMPTS)


@pytest.mark.parametrize("tracker", ["tensorbord", Kept, object(), True])
def test_other_trackers_are_refused(model: nn.Module, tracker: Any) -> None:
    with pytest.raises(InputError, match=r"^tracker is .*, but must be .*none, tensorboard, wandb, trackio, mlflow"):
        Engine(model, None, tracker=tracker)


def test_ranks_that_have_not_met_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^tracker needs accelerate's state: make an Accelerator"):
        Engine(model, None, tracker="tensorboard")
