"""What of a recurrent layer is neither a tensor nor a shape, and the string by which operators know it.

An operator that a compiler leaves opaque takes tensors, numbers and strings, and neither modules nor functions. So a
layer is told in two parts: a `Form`, read off its modules, and the weights that the form names.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, get_type_hints

from effml_shared.errors import ConfigError
from effml_shared.layers import ACTIVATIONS, Block, LayerNorm, RMSNorm
from torch import Tensor, nn

__all__ = ["NORMS", "Form", "form_of", "weights_of"]

NORMS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (RMSNorm, LayerNorm, nn.Identity)}
_MATRICES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


class Form(NamedTuple):
    """A layer but for its weights."""

    mlp: str  # as in `TransformerConfig`
    mlp_bias: bool
    head_dim: int
    whole_keys: bool  # keys are normalised over all heads together
    scale: float  # of both branches
    source_norm: str  # of x, and of what persistent pairs are made from; a name in NORMS
    source_eps: float
    key_norm: str
    key_eps: float
    mlp_norm: str
    mlp_eps: float
    dropout: float  # probability with which a number that a branch adds is dropped
    alibi: bool
    window: int  # 0: none
    write_mix: float
    base_block: int
    schedule: str
    cuda_graphs: bool

    @property
    def spec(self) -> str:
        """The form as a string, from which `from_spec` makes it again."""
        return " ".join([str(value) for value in self])

    @staticmethod
    @functools.lru_cache
    def from_spec(spec: str) -> Form:
        """Return the form that a string was made of."""
        fields = zip(get_type_hints(Form).values(), spec.split(), strict=True)
        return Form._make(text == "True" if kind is bool else kind(text) for kind, text in fields)

    @property
    def weights(self) -> list[str]:
        """The names of the parameters that the recurrence reads: all but those of queries."""
        names = [f"{matrix}.weight" for matrix in _MATRICES]
        if self.mlp == "swiglu":
            names.append("mlp.gate_proj.weight")
        if self.mlp_bias:
            names += [name.replace("weight", "bias") for name in names if name.startswith("mlp.")]
        norms = (
            ("input_layernorm", self.source_norm),
            ("self_attn.k_norm", self.key_norm),
            ("post_attention_layernorm", self.mlp_norm),
        )
        return names + [f"{name}.weight" for name, kind in norms if kind != "Identity"]


def form_of(
    layer: Block,
    *,
    dropout: float = 0.0,
    alibi: bool = False,
    window: int | None = None,
    write_mix: float = 1.0,
    base_block: int = 1,
    schedule: str = "tile",
    cuda_graphs: bool = False,
) -> Form:
    """Return the form of a layer, of which the named settings are no modules.

    Raises:
        ConfigError: a part is not the plain module that the folded arithmetic stands for.
    """
    attn, activation = layer.self_attn, layer.mlp.activation
    mlp = next((name for name, function in ACTIVATIONS.items() if function is activation), None)
    _check("mlp.activation", activation, "one of the shared MLP's", mlp is not None)
    gate = (("mlp.gate_proj", layer.mlp.gate_proj),) if mlp == "swiglu" else ()
    for name, module in (*((name, layer.get_submodule(name)) for name in _MATRICES), *gate):
        _check(name, module, "nn.Linear", type(module) is nn.Linear)
        biased = name.startswith("mlp.") and layer.mlp.up_proj.bias is not None
        _check(f"{name}.bias", module.bias, "one" if biased else "None", (module.bias is not None) == biased)
    norms = (
        ("input_layernorm", layer.input_layernorm),
        ("self_attn.k_norm", attn.k_norm),
        ("post_attention_layernorm", layer.post_attention_layernorm),
    )
    values: list[Any] = [mlp, layer.mlp.up_proj.bias is not None, attn.head_dim, attn.qk_norm == "full", layer.scale]
    for name, module in norms:
        kind = type(module).__name__
        _check(name, module, "RMSNorm, LayerNorm or nn.Identity", type(module) is NORMS.get(kind))
        values += [kind, getattr(module, "eps", 0.0)]
    return Form._make((*values, dropout, alibi, window or 0, write_mix, base_block, schedule, cuda_graphs))


def _check(name: str, part: Any, expected: str, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"{name}: got {type(part).__name__}, expected {expected}, or backend='naive'")


def weights_of(layer: Block, form: Form) -> list[Tensor]:
    """Return the parameters that a form names, detached."""
    split = [name.rpartition(".") for name in form.weights]
    return [getattr(layer.get_submodule(module), key).detach() for module, _, key in split]
