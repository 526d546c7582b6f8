"""Which columns of a dataset a job reads, keeps, and passes to a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.config.schema import DataConfig


@dataclass(frozen=True, slots=True)
class ColumnChoice:
    """The columns of a dataset that a job holds; all other columns are not even read."""

    read: dict[str, str]
    """Column by the configuration key that names it; such a column must exist."""
    optional: tuple[str, ...] = ()
    """Columns that are read where the dataset has them."""
    kept: tuple[str, ...] | None = ()
    """Columns that stand in the output; None for all."""
    for_reward: bool = False
    """Whether a reward reads all columns."""

    @property
    def all(self) -> bool:
        """Whether every column is held."""
        return self.for_reward or self.kept is None

    def chosen(self, available: Sequence[str]) -> list[str]:
        """Return the available columns that are held, in the dataset's order."""
        if self.all:
            return list(available)
        wanted = {*self.read.values(), *self.optional, *(self.kept or ())}
        return [name for name in available if name in wanted]


def columns_read(config: DataConfig) -> dict[str, str]:
    """Return the columns that a configuration names, by the key that names each.

    A feature that reads a further column adds its key here; that column must then exist, and is read by `read_prompts`.
    """
    named = {
        "data.prompt_column": config.prompt_column,
        "data.id_column": config.id_column,
        "data.length_hint_column": config.length_hint_column,
    }
    return {key: column for key, column in named.items() if column is not None}


#: Columns that are read by themselves where the dataset has them.
OPTIONAL_COLUMNS: tuple[str, ...] = ()
