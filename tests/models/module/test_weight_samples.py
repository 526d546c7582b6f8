"""What samples of weights see, and which parameters count as changed together."""

from __future__ import annotations

import torch
from torch import nn

from rollout.models.module.weight_samples import WeightSamples


def _layers(count: int = 3, width: int = 300) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def _changed(model: nn.Sequential, samples: WeightSamples) -> set[str]:
    values = samples.compare().values
    return {
        name for name, module in model.named_children() for key in module._parameters if (id(module), key) in values
    }


def test_nothing_has_changed_at_first() -> None:
    model = _layers()
    samples = WeightSamples(model)
    assert not samples.compare().values
    assert not samples.compare().moved


def test_parameters_that_are_not_trained_change_together() -> None:
    """A moving average in half precision changes too few elements of some matrices for their samples."""
    model = _layers()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    samples = WeightSamples(model)
    model[0].weight.data.mul_(1.5)
    assert _changed(model, samples) == {"0", "1"}


def test_training_leaves_what_is_frozen() -> None:
    model = _layers()
    model[0].requires_grad_(False)
    samples = WeightSamples(model)
    model[1].weight.data.mul_(1.5)
    assert _changed(model, samples) == {"1", "2"}


def test_buffer_changes_alone() -> None:
    model = _layers(1)
    model.register_buffer("steps", torch.zeros(1))
    samples = WeightSamples(model)
    model.steps += 1
    assert samples.compare().values == {(id(model), "steps")}


def test_buffer_that_is_written_with_the_same_values_has_not_changed() -> None:
    """Data parallelism writes them at every forward."""
    model = _layers(1)
    model.register_buffer("steps", torch.zeros(1))
    samples = WeightSamples(model)
    model.steps.copy_(model.steps.clone())
    assert not samples.compare().values


def test_element_that_is_written_in_place_is_seen() -> None:
    model = _layers()
    samples = WeightSamples(model)
    with torch.no_grad():
        model[1].weight[123, 45] += 1
    assert _changed(model, samples) == {"0", "1", "2"}
    assert not samples.compare().values


def test_every_row_is_seen_of_small_matrices_and_whole_vectors() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    for index in range(32):
        samples = WeightSamples(model)
        model[0].weight.data[index, index] += 1
        assert samples.compare().values
        model[0].bias.data[index] += 1
        assert samples.compare().values


def test_every_expert_of_sixty_four_is_seen() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(64, 96, 48))
    for expert in range(64):
        samples = WeightSamples(model)
        model.experts.data[expert] += 1
        assert samples.compare().values, expert


def test_parameter_that_is_stored_elsewhere_with_the_same_values_has_only_moved() -> None:
    model = _layers()
    samples = WeightSamples(model)
    model[1].weight.data = model[1].weight.data.clone()
    change = samples.compare()
    assert change.moved
    assert not change.values


def test_transposed_parameter_has_another_form() -> None:
    model = _layers()
    samples = WeightSamples(model)
    model[1].weight.data = model[1].weight.data.t()
    assert samples.compare().reformatted
