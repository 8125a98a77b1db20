"""Which parameters a matrix optimizer should train, and which it should leave to AdamW.

A hidden weight maps activations to activations, and its rows and columns are worth rotating. The rows of an embedding
and of an output head belong to single tokens, norms and biases are vectors: elementwise AdamW suits them. The number of
axes alone cannot tell a head from a hidden matrix, so modules, names and shapes are all asked, in that order. No state;
costs one walk over the modules.

Source: the routing of K. Jordan's Muon (https://kellerjordan.github.io/posts/muon/) and of SOAP (arXiv 2409.11321).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from effml_shared.errors import ConfigError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["parameter_roles", "split_params"]

ROLES = ("embed", "head", "vector", "matrix")  # a tied parameter takes the first of its roles
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_EMBED_NAMES = (
    "embed",
    "embedding",
    "embeddings",
    "wte",
    "wpe",
    "cls_token",
    "pos_embed",
    "position_embedding",
    "tok_embeddings",
)
_HEAD_NAMES = (
    "lm_head",
    "head",
    "classifier",
    "score",
    "unembed",
    "unembedding",
    "embed_out",
    "qa_outputs",
    "out_head",
)


def split_params(
    model: nn.Module,
    *,
    matrix: Mapping[str, Any] | None = None,
    embed: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    vector: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into param groups, one per role, for `SOAP`, `Shampoo` or `Muon`.

    Each group holds named parameters, its `role`, and `use_adamw`, which is False for `"matrix"` only. Frozen
    parameters are left out, tied ones appear once, empty groups are dropped.

    Args:
        model: any module; wrappers such as DDP and `torch.compile` are looked through.
        matrix, embed, head, vector: options of that role's group, such as `{"lr": 3e-4}`. `vector` starts from
            `{"weight_decay": 0.0}`, and any of them may set `use_adamw` itself.
        roles: shell patterns of parameter names with the role to give them, first match wins:
            `{"*.router.weight": "vector"}`.

    Raises:
        ConfigError: an unknown role, or a pattern of `roles` that matches no parameter.

    >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 50, bias=False))
    >>> {g["role"]: [name for name, _ in g["params"]] for g in split_params(model, embed={"lr": 1e-3})}
    {'embed': ['0.weight'], 'head': ['3.weight'], 'vector': ['1.bias', '2.weight', '2.bias'], 'matrix': ['1.weight']}
    """
    options = {"embed": embed, "head": head, "vector": {"weight_decay": 0.0, **(vector or {})}, "matrix": matrix}
    role_of = parameter_roles(model, roles)
    groups = []
    for role in ROLES:
        named = [
            (name, param) for name, param in model.named_parameters() if param.requires_grad and role_of[name] == role
        ]
        if named:
            groups.append({"params": named, "role": role, "use_adamw": role != "matrix", **(options[role] or {})})
    return groups


def parameter_roles(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the role of every parameter: `"embed"`, `"head"`, `"vector"` or `"matrix"`.

    Names are those of `model.named_parameters()`: of a tied parameter, the first.

    >>> parameter_roles(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2, bias=False)))
    {'0.weight': 'matrix', '0.bias': 'vector', '2.weight': 'head'}
    """
    patterns = dict(roles or {})
    if unknown := set(patterns.values()) - set(ROLES):
        raise ConfigError(f"roles: got {unknown.pop()!r}, expected one of {', '.join(ROLES)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    inputs, outputs = _hugging_face_ends(model)
    head = _last_linear(model)
    unmatched = set(patterns)
    found: dict[int, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        matches = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        unmatched -= set(matches)
        if matches:
            role = patterns[matches[0]]
        elif param.ndim < 2 or max(param.shape) == param.numel() or isinstance(module, _NORMS) or leaf.endswith("bias"):
            role = "vector"
        elif module is inputs or isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or _named(name, _EMBED_NAMES):
            role = "embed"
        elif module is outputs or module is head or _named(name, _HEAD_NAMES):
            role = "head"
        else:
            role = "matrix"
        found.setdefault(id(param), set()).add(role)
    if unmatched:
        raise ConfigError(f"roles: got the pattern {unmatched.pop()!r}, which matches no parameter")
    return {name: next(r for r in ROLES if r in found[id(param)]) for name, param in model.named_parameters()}


def _named(name: str, words: tuple[str, ...]) -> bool:
    """Whether the parameter itself or the module that owns it has one of these names."""
    return any(part in words for part in name.split(".")[-2:])


def _hugging_face_ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    module: Any
    for module in model.modules():  # the outermost model that knows its own ends
        if hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings"):
            with suppress(NotImplementedError):  # models without tokens
                return module.get_input_embeddings(), module.get_output_embeddings()
    return None, None


def _last_linear(model: nn.Module) -> nn.Module | None:
    """The model's last weight, if it belongs to a Linear directly under the root: the head of a plain network."""
    last: tuple[str, nn.Module | None] = ("", None)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            last = (name, module)
    path = [part for part in last[0].split(".") if part and part not in _WRAPPERS]
    return last[1] if len(path) == 1 and isinstance(last[1], nn.Linear) else None
