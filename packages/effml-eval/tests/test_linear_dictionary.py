from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, check_fit, largest_codes
from effml_shared.errors import ConfigError


def test_decoding_adds_the_offset() -> None:
    model = LinearDictionary(2 * torch.eye(2), torch.tensor([1.0, 0.0]))
    assert model.decode(torch.tensor([[1.0, 3.0]])).tolist() == [[3.0, 6.0]]
    assert model.decode(largest_codes(torch.tensor([[1.0, -3.0]]), 1)).tolist() == [[1.0, -6.0]]


def test_the_largest_codes_are_those_of_largest_magnitude() -> None:
    codes = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 3.0]])
    assert largest_codes(codes, 2).dense().tolist() == [[0.0, -2.0, 1.0], [0.0, 0.0, 3.0]]
    assert torch.equal(largest_codes(codes, 3).dense(), codes)
    with pytest.raises(ConfigError, match=r"^k: got 4 of 3 concepts"):
        largest_codes(codes, 4)
    with pytest.raises(ConfigError, match=r"^k: got 0"):
        largest_codes(codes, 0)


def test_there_must_be_data_enough() -> None:
    assert check_fit(torch.ones(3, 2).half(), 3, at_most="rows").dtype == torch.float32
    with pytest.raises(ConfigError, match=r"^n_concepts: got 3 for data of shape \(3, 2\), expected at most 2$"):
        check_fit(torch.ones(3, 2), 3, at_most="rank")
    with pytest.raises(ConfigError, match=r"^n_concepts: got 4 .*expected at most 3$"):
        check_fit(torch.ones(3, 2), 4, at_most="rows")
    with pytest.raises(ConfigError, match=r"^n_concepts: got 0"):
        check_fit(torch.ones(3, 2), 0, at_most="rows")
