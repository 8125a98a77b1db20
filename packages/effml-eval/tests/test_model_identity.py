from __future__ import annotations

import copy
import hashlib

import torch
from effml_eval.evaluation.model_identity import describe_model, tokenizer_sha256, weights_sha256
from effml_eval.scoring import LMScorer
from effml_shared.data.tokenizers import ByteTokenizer
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 257)


def test_a_sum_of_all_weights() -> None:
    model = Small()
    expected = weights_sha256(model)
    assert weights_sha256(copy.deepcopy(model)) == expected
    strided = copy.deepcopy(model)
    strided.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    assert weights_sha256(strided) == expected  # how it lies in memory does not matter
    others = [copy.deepcopy(model) for _ in range(4)]
    with torch.no_grad():
        others[0].weight[1, 2] += 1e-6
        others[1].scale.neg_()
    others[2].weight = nn.Parameter(model.weight.detach().view(3, 2))
    others[3].double()
    assert len({expected, *map(weights_sha256, others)}) == 5


def test_descriptions() -> None:
    scorer = LMScorer(Small(), ByteTokenizer())
    described = describe_model(scorer, None, ["base"])
    assert described == {
        "id": "Small",
        "lineage": ["base"],
        "param_count": 7,
        "dtype": "bfloat16+float32",
        "weights_sha256": weights_sha256(Small()),
    }
    assert describe_model(scorer, "mine", weights=False)["weights_sha256"] is None
    assert tokenizer_sha256(scorer) == hashlib.sha256(b"byte").hexdigest()


def test_a_scorer_of_another_kind() -> None:
    class Remote:
        score = rolling = generate = None

    described = describe_model(Remote(), None)  # type: ignore[arg-type]
    assert described["id"] == "Remote"
    assert described["weights_sha256"] is described["param_count"] is None
    assert tokenizer_sha256(Remote()) is None  # type: ignore[arg-type]
