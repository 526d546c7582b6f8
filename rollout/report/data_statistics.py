"""Statistics of a run's records, accumulated file by file in memory that does not grow with the number of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rollout.report.record_files import RecordFile, UnreadableFile, read_batches
from rollout.report.samples_to_read import SamplePicker

MOST_BYTES = 2 << 30
"""Files of records that are read; of a larger run, shards at equal distances."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class Groups:
    """Rewards of the samples of one prompt, over prompts of which at least two samples have a reward."""

    constant: Counter[float] = field(default_factory=Counter)
    """Prompts by the reward that all of their samples have."""
    mixed: int = 0
    """Prompts whose samples differ in reward."""
    means: Counter[float] = field(default_factory=Counter)
    """Prompts by mean reward, rounded to three digits."""
    deviation_sum: float = 0.0
    """Sum of the standard deviations within prompts."""

    @property
    def prompts(self) -> int:
        return self.mixed + self.constant.total()


@dataclass(slots=True)
class DataStatistics:
    """What the report shows about the records that it read."""

    prompt_lengths: Counter[int] = field(default_factory=Counter)
    """Prompts by number of tokens; without prompts that could not be tokenised."""
    completion_lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """Samples by number of tokens, per finish reason."""
    rewards: Counter[float] = field(default_factory=Counter)
    """Samples by reward, rounded to three digits."""
    rewarded: Counter[str] = field(default_factory=Counter)
    """Samples with a reward, per finish reason."""
    reward_sums: Counter[str] = field(default_factory=Counter)
    """Sum of their rewards, per finish reason."""
    reward_squares: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    """Samples by class of error."""
    groups: Groups = field(default_factory=Groups)
    files: int = 0
    """Files read."""
    skipped_files: int = 0
    """Files that were not read because the run is large."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """The reason why a file could not be read, by its name."""

    @property
    def samples(self) -> int:
        return sum(lengths.total() for lengths in self.completion_lengths.values())


def read_statistics(files: Sequence[RecordFile], picker: SamplePicker) -> DataStatistics:
    """Read the records of a run, and offer each of them to a picker.

    Args:
        files: of `rollout.report.record_files.record_files`.
    """
    statistics = DataStatistics()
    chosen = _within_budget(files)
    statistics.skipped_files = len(files) - len(chosen)
    for file in chosen:
        try:
            _add_file(statistics, picker, file)
            statistics.files += 1
        except UnreadableFile as error:
            statistics.unreadable[file.name] = str(error)
    return statistics


def _within_budget(files: Sequence[RecordFile]) -> list[RecordFile]:
    """Return all files, or some at equal distances whose sizes sum to about `MOST_BYTES`."""
    size = sum(file.bytes for file in files)
    stride = max(1.0, size / MOST_BYTES)
    return [files[int(i * stride)] for i in range(int(np.ceil(len(files) / stride)))]


def _add_file(statistics: DataStatistics, picker: SamplePicker, file: RecordFile) -> None:
    """Add the records of one shard, which holds all samples of its prompts."""
    row_ids, rewards = [], []
    start = 0
    for batch in read_batches(file):
        _add_batch(statistics, picker, file, start, batch)
        row_ids.append(batch["row_id"])
        rewards.append(batch["reward"])
        start += len(batch)
    if start:
        _add_groups(statistics.groups, picker, file, pa.table({
            "row_id": pa.chunked_array(row_ids),
            "reward": pc.cast(pa.chunked_array(rewards), pa.float64()),
            "row": np.arange(start),
        }))  # fmt: skip


def _add_batch(
    statistics: DataStatistics, picker: SamplePicker, file: RecordFile, start: int, batch: pa.RecordBatch
) -> None:
    lengths = pc.fill_null(pc.list_value_length(batch["completion_ids"]), 0).to_numpy()
    prompts = pc.fill_null(pc.list_value_length(batch["prompt_ids"]), 0).to_numpy()
    rewards = pc.cast(batch["reward"], pa.float64()).to_numpy(zero_copy_only=False)
    first = pc.fill_null(pc.equal(batch["sample"], 0), False).to_numpy(zero_copy_only=False)
    reasons, errors = _positions(batch["finish_reason"]), _positions(batch["error_class"])

    statistics.prompt_lengths.update(_counted(prompts[first & (prompts > 0)]))
    known = ~np.isnan(rewards)
    statistics.rewards.update(_counted_rewards(rewards[known]))
    statistics.reward_squares += float(np.square(rewards[known]).sum())
    for name, these in reasons.items():
        statistics.completion_lengths.setdefault(name, Counter()).update(_counted(lengths[these]))
        statistics.rewarded[name] += int(known[these].sum())
        statistics.reward_sums[name] += float(np.nansum(rewards[these]))  # type: ignore[assignment]
    statistics.errors.update({name: len(these) for name, these in errors.items() if name})
    picker.add(file, start, lengths=lengths, rewards=rewards, reasons=reasons, errors=errors)


def _add_groups(groups: Groups, picker: SamplePicker, file: RecordFile, table: pa.Table) -> None:
    grouped = table.group_by("row_id", use_threads=False).aggregate(
        [("reward", kind) for kind in ("count", "min", "max", "mean", "stddev")] + [("row", "min")]
    )
    count, low, high, mean, deviation, row = (
        grouped[name].to_numpy()
        for name in ("reward_count", "reward_min", "reward_max", "reward_mean", "reward_stddev", "row_min")
    )
    several = count > 1
    same = several & (low == high)
    groups.constant.update(_counted_rewards(low[same]))
    groups.mixed += int((several & ~same).sum())
    groups.means.update(_counted_rewards(mean[several]))
    groups.deviation_sum += float(deviation[several].sum())
    picker.add_prompts(file, row[several], means=mean[several], deviations=deviation[several])


def _positions(column: pa.Array) -> dict[str, IntArray]:
    """Return the positions of each value in a column of few values."""
    encoded = pc.fill_null(column, "").dictionary_encode()
    codes = encoded.indices.to_numpy()
    return {name: np.flatnonzero(codes == code) for code, name in enumerate(encoded.dictionary.to_pylist())}


def _counted(values: IntArray) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _counted_rewards(values: FloatArray) -> Counter[float]:
    """Count rewards by their first three digits, which bounds the number of different ones."""
    total: Counter[float] = Counter()
    for value, count in zip(*(column.tolist() for column in np.unique(values, return_counts=True)), strict=True):
        total[float(f"{value:.3g}")] += count
    return total
