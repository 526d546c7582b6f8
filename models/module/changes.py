"""Notice what the owner of a module has done to it since the engine looked last."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rollout.models.module.structure import ModuleStructure
from rollout.models.module.weight_samples import Name, WeightSamples

#: PEFT's list of the adapters that a layer's weight includes.
_MERGED = "merged_adapters"


@dataclass(frozen=True, slots=True)
class Change:
    """What differs in a module from the last look."""

    structure: bool = False
    """Modules, hooks, or the shapes, dtypes or devices of tensors. Everything made of the module is to be made anew."""
    settings: bool = False
    """Factors, or which adapters are active, merged or disabled."""
    moved: bool = False
    """Whether a tensor is stored elsewhere."""
    values: frozenset[Name] = frozenset()
    """Parameters and buffers with other values; incomplete if the structure differs."""

    @property
    def weights(self) -> bool:
        """Whether the module computes other numbers than before, as far as can be seen."""
        return self.structure or self.settings or bool(self.values)


class ModuleWatch:
    """Compares a module with what it was at the last look. Holds no tensor of it.

    Args:
        model: the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start()

    def _start(self) -> None:
        self._structure = ModuleStructure(self._model)
        self._samples = WeightSamples(self._model)

    def look(self, *, declared: bool = False) -> Change:
        """Return what has changed since the last look.

        Args:
            declared: whether its owner says that weights have changed; then all values count as others.
        """
        if not self._structure.same_modules():
            self._start()
            return Change(structure=True, settings=True, moved=True)
        settings = self._structure.other_settings()
        if settings:
            self._structure = ModuleStructure(self._model)
        found = self._samples.compare()
        # A merge may change too little for half precision to show it in every sample.
        every = declared or _MERGED in settings
        return Change(
            structure=found.reformatted,
            settings=bool(settings) or declared or found.reformatted,
            moved=found.moved,
            values=self._samples.names if every else found.values,
        )
