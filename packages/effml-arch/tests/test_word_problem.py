from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from effml_arch.tasks.word_problem import WordProblem, products
from effml_shared.errors import ConfigError


def test_degree_two_is_prefix_parity_on_every_sequence() -> None:
    bits = np.array(list(itertools.product([0, 1], repeat=8)), np.uint64)
    ids, targets = WordProblem(length=8).encode(bits)
    assert np.array_equal(ids, bits)
    assert np.array_equal(targets, np.cumsum(bits, axis=1) % 2)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_products_are_those_of_permutation_matrices(degree: int) -> None:
    matrices = [
        np.eye(degree)[list(p)].T for p in itertools.permutations(range(degree))
    ]  # column i has a 1 in row p(i)
    for a, left in enumerate(matrices):
        for b, right in enumerate(matrices):
            assert np.array_equal(matrices[products(degree)[a, b]], left @ right)


def test_the_largest_group_is_a_group() -> None:
    table = products(6)
    assert table.shape == (720, 720)
    assert np.array_equal(table[0], np.arange(720))
    assert np.array_equal(np.sort(table, axis=0), np.sort(table, axis=1).T)  # every row and column: all elements


def test_targets_are_products_of_the_prefix() -> None:
    task = WordProblem(length=7, degree=3)
    batch = task.batch(range(50))
    for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
        product = (0, 1, 2)
        order = list(itertools.permutations(range(3)))
        for token, target in zip(ids, targets, strict=True):
            product = tuple(order[token][place] for place in product)
            assert order[target] == product


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_ids_and_targets_are_uniform(degree: int) -> None:
    task = WordProblem(length=40, degree=degree)
    batch = task.batch(range(400))
    for values in (batch["input_ids"], batch["targets"][:, -1:]):
        counts = torch.bincount(values.flatten(), minlength=task.vocab_size).double()
        expected = values.numel() / task.vocab_size
        chi2, freedom = ((counts - expected) ** 2 / expected).sum(), task.vocab_size - 1
        assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("fields", [{"length": 0}, {"degree": 0}, {"degree": 7}, {"length": 2.0}])
def test_wrong_fields_are_named(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        WordProblem(**fields)
