from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.top_inputs import top_inputs
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError


def test_the_strongest_rows_of_every_concept(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-2, 5, (30, 6), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 3] = 0
    codes[5:, 4] = 0
    for block in (1 << 22, 50):
        monkeypatch.setattr("effml_eval.concepts.code_entries.BLOCK", block)
        for form in (codes, SparseCodes.from_dense(codes)):
            found = top_inputs(form, 7)
            for i in range(6):
                ranked = sorted(range(30), key=lambda n: (-codes[n, i], n))
                expected = [n for n in ranked if codes[n, i] > 0][:7]
                assert found.rows[i].tolist() == expected + [-1] * (7 - len(expected))
                assert found.codes[i].tolist() == [float(codes[n, i]) for n in expected] + [0.0] * (7 - len(expected))


def test_empty_and_wrong() -> None:
    assert top_inputs(torch.zeros(0, 2), 1).rows.tolist() == [[-1], [-1]]
    with pytest.raises(ConfigError, match=r"^top: got 0"):
        top_inputs(torch.ones(2, 2), 0)
