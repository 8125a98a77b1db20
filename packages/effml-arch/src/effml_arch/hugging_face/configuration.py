"""The configuration of a Recurrent Transformer under the field names of Hugging Face's transformers.

Fields map one to one to those of `RecurrentTransformerConfig`: sizes have the names that tools of that world look for,
the others keep theirs. Fields that a recurrent model cannot choose (causal, pre-norm) are left out.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PretrainedConfig

from effml_arch.recurrent.layer import RecurrentTransformerConfig

__all__ = ["HFRecurrentTransformerConfig"]

_RENAMED = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "tied": "tie_word_embeddings",
}
_FIXED = ("causal", "norm_position")
_FIELDS = {  # their name: ours
    _RENAMED.get(field.name, field.name): field.name
    for field in fields(RecurrentTransformerConfig)
    if field.name not in _FIXED
}


class HFRecurrentTransformerConfig(PretrainedConfig):
    """Say what a `RecurrentTransformerForCausalLM` is; defaults and checks are those of `RecurrentTransformerConfig`.

    What is given as None is stored as the number it stands for. As everywhere in transformers, a name that is no field
    is stored too, and means nothing.

    >>> config = HFRecurrentTransformerConfig(hidden_size=64, num_hidden_layers=2, mlp="gelu")
    >>> config.to_effml().d_model, config.num_key_value_heads, config.intermediate_size
    (64, 4, 256)
    """

    model_type = "effml_recurrent_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        *,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {_FIELDS[name]: kwargs.pop(name) for name in [*kwargs] if name in _FIELDS}
        config = RecurrentTransformerConfig(**given)
        ids = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=config.tied, **ids, **kwargs)
        resolved = {"n_kv_heads": config.kv_heads, "d_ff": config.ff_dim, "vocab_rows": config.rows}
        for name, ours in _FIELDS.items():
            setattr(self, name, resolved.get(ours, getattr(config, ours)))
        self.use_cache = use_cache

    @classmethod
    def from_effml(cls, config: RecurrentTransformerConfig, **kwargs: Any) -> HFRecurrentTransformerConfig:
        """Return the same configuration under these names; the arguments are fields that only transformers has."""
        return cls(**{name: getattr(config, ours) for name, ours in _FIELDS.items()}, **kwargs)

    def to_effml(self) -> RecurrentTransformerConfig:
        """Return the configuration under our names.

        Raises:
            ConfigError: a field has since been set to what does not fit the others.
        """
        return RecurrentTransformerConfig(**{ours: getattr(self, name) for name, ours in _FIELDS.items()})
