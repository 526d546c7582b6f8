"""Counter-based noise: published numbers, good statistics, and no dependence on batch composition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rollout.models.sampling import philox as module
from rollout.models.sampling.philox import gumbel, philox

EULER = 0.5772156649015329


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


def keys_of(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter: list[int], key: list[int], expected: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox(words(*counter), words(*key))) == expected


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox in Python's integers, which do not wrap around."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def test_philox_of_tensors_matches_python_integers() -> None:
    seed = 11
    print("seed", seed)
    inputs = np.random.default_rng(seed).integers(0, 1 << 32, (200, 6))
    columns = [torch.from_numpy(column.copy()) for column in inputs.T]
    ours = torch.stack(philox(tuple(columns[:4]), tuple(columns[4:])), 1)
    assert ours.tolist() == [plain_philox(row[:4], row[4:]) for row in inputs.tolist()]


def test_each_input_bit_flips_half_of_the_output_bits() -> None:
    seed = 5
    print("seed", seed)
    count = 256
    inputs = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << 32, (6, count)))

    def output(values: torch.Tensor) -> torch.Tensor:
        return torch.stack(philox(tuple(values[:4]), tuple(values[4:])))

    def bits(values: torch.Tensor) -> torch.Tensor:
        return (values[..., None] >> torch.arange(32)) & 1

    base = bits(output(inputs))
    for word in range(6):
        for bit in range(32):
            flipped = inputs.clone()
            flipped[word] ^= 1 << bit
            share = float((bits(output(flipped)) ^ base).double().mean())
            # 256 * 128 fair coins: the standard deviation of the share is 0.0028.
            assert abs(share - 0.5) < 6 * 0.0028, (word, bit, share)


def test_gumbel_has_the_gumbel_distribution() -> None:
    rows, count = 400, 500
    noise = gumbel(count, keys_of((123, 456)).expand(rows, 2), torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    assert noise.dtype == torch.float64
    values = noise.flatten().numpy()
    size = len(values)
    deviation = math.pi / math.sqrt(6)
    assert abs(values.mean() - EULER) < 5 * deviation / math.sqrt(size)
    # The fourth central moment of the distribution is 5.4 times its variance squared.
    assert abs(values.var() - deviation**2) < 5 * deviation**2 * math.sqrt(4.4 / size)
    # Kolmogorov-Smirnov at one in a million.
    ordered = np.exp(-np.exp(-np.sort(values)))
    steps = np.arange(size + 1) / size
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < math.sqrt(-math.log(0.5e-6) / (2 * size))


def test_neighbouring_counters_are_not_correlated() -> None:
    rows, count = 300, 300
    ones = torch.ones(rows, dtype=torch.int64)

    def noise(key: tuple[int, int], sample: int, shift: int) -> np.ndarray:
        return gumbel(count, keys_of(key).expand(rows, 2), sample * ones, torch.arange(rows) + shift).flatten().numpy()

    base = noise((7, 9), 0, 0)
    others = {
        "next position": noise((7, 9), 0, 1),
        "next sample": noise((7, 9), 1, 0),
        "next key": noise((8, 9), 0, 0),
        "other key word": noise((7, 10), 0, 0),
        "next entry": np.roll(base, 1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(base, other)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(rows * count), name


def test_counter_format_is_pinned() -> None:
    """Draws of a seed must not change between versions."""
    noise = gumbel(7, keys_of((3, 0xFFFFFFFF)), torch.tensor([21]), torch.tensor([500]))[0]
    integers = [word for block in range(2) for word in plain_philox([block, 500, 21, 0], [3, 0xFFFFFFFF])]
    expected = [-math.log(-math.log((integer + 0.5) / 2**32)) for integer in integers[:7]]
    assert noise.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_gumbel_of_extreme_words_is_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(counter: tuple[torch.Tensor, ...], _key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full_like(counter[0], word) for _ in range(4))

    monkeypatch.setattr(module, "philox", constant)
    noise = gumbel(3, keys_of((0, 0)), torch.tensor([0]), torch.tensor([0]))
    assert noise.isfinite().all()


def test_row_noise_does_not_depend_on_batch_composition() -> None:
    seed = 3
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows = 37
    keys = torch.from_numpy(rng.integers(0, 1 << 32, (rows, 2)))
    samples, positions = (torch.from_numpy(rng.integers(0, 4000, rows)) for _ in range(2))
    batched = gumbel(100, keys, samples, positions)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = gumbel(100, keys[one], samples[one], positions[one])
        assert torch.equal(alone[0], batched[i])
    order = torch.from_numpy(rng.permutation(rows))
    assert torch.equal(gumbel(100, keys[order], samples[order], positions[order]), batched[order])
    assert torch.equal(gumbel(33, keys, samples, positions), batched[:, :33]), "a longer row has the same prefix"
    assert len(batched.unique()) > 0.99 * batched.numel()
