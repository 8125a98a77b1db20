"""Which model and tokenizer answered: names, sizes, and sha256 sums that tell two of one name apart.

The sum of a model is over the names, types, shapes and bytes of its whole state: one pass over the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from effml_eval.scoring.language_model_scorer import LMScorer
from effml_eval.scoring.scorer import Scorer

__all__ = ["describe_model", "tokenizer_sha256", "weights_sha256"]


def describe_model(
    scorer: Scorer, model_id: str | None, lineage: Sequence[str] = (), *, weights: bool = True
) -> dict[str, Any]:
    """Return what results record of a model; of a scorer that is no `LMScorer` its name is all that is known.

    Args:
        model_id: None: what the model's own config says, else the name of its class.
        lineage: names of the models that it was made from.
        weights: compute their sha256; else it is None.
    """
    model = scorer.model.model if isinstance(scorer, LMScorer) else scorer
    own = getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    described = {"id": model_id if model_id is not None else own, "lineage": list(lineage)}
    if not isinstance(model, nn.Module):
        return {**described, "param_count": None, "dtype": None, "weights_sha256": None}
    parameters = list(model.parameters())
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return {
        **described,
        "param_count": sum(parameter.numel() for parameter in parameters),
        "dtype": "+".join(dtypes),
        "weights_sha256": weights_sha256(model) if weights else None,
    }


@torch.no_grad()
def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of a model's state.

    >>> weights_sha256(nn.Linear(2, 1)) == weights_sha256(nn.Linear(2, 1))
    False
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue  # what a module keeps beside its tensors
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        for part in value.detach().reshape(-1).split(1 << 24):
            digest.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_sha256(scorer: Scorer) -> str | None:
    """Return the sha256 of what defines a tokenizer; None where the scorer has none that is known."""
    if not isinstance(scorer, LMScorer):
        return None
    tokenizer = scorer.tokenizer.tokenizer
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        text = backend.to_str()
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        text = str(getattr(tokenizer, "name", type(tokenizer).__name__))
    return hashlib.sha256(text.encode()).hexdigest()
