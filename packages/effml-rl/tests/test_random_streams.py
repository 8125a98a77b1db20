"""Streams: known outputs, uniform, independent, and nobody's but the row's own."""

from __future__ import annotations

import numpy as np
from effml_rl.random_streams import stream_keys, uniforms
from scipy.stats import kstest


def keys(count: int, seed: int = 0, draw: int = 0, prompt: tuple[int, ...] = (1, 2)) -> np.ndarray:
    return stream_keys(seed, draw, prompt, np.arange(count))


def test_the_outputs_are_those_of_splitmix64() -> None:
    """Published outputs for the seed 1234567, of which 52 bits are kept."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniforms(np.array([1234567], np.uint64), 4)
    assert got.tolist() == [[(value >> 12) / 2**52 for value in published]]


def test_a_row_has_its_numbers_in_any_company() -> None:
    whole = uniforms(keys(9), 12)
    assert whole.dtype == np.float64
    assert (uniforms(keys(5)[3:4], 30)[0, :12] == whole[3]).all()
    assert (stream_keys(0, 0, (1, 2), np.array([7])) == keys(9)[7]).all()
    for other in (keys(9, seed=1), keys(9, draw=1), keys(9, prompt=(2, 1)), keys(9, prompt=(12,))):
        assert not np.isin(uniforms(other, 12), whole).any()


def test_they_are_uniform_and_independent() -> None:
    numbers = uniforms(keys(400), 250)
    assert 0 <= numbers.min() < numbers.max() <= 1 - 2.0**-52
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for lag in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):  # neighbours in sample and in time
        assert abs(lag.mean() - 0.25) < 4 * (7 / 144 / lag.size) ** 0.5
