from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from effml_arch.recurrent.layer import RecurrentTransformerConfig
from effml_shared.errors import ConfigError, MissingExtra

hugging_face = pytest.importorskip("effml_arch.hugging_face", exc_type=ImportError)
HFConfig = hugging_face.HFRecurrentTransformerConfig

CONFIGS = {
    "default": RecurrentTransformerConfig(),
    "rope": RecurrentTransformerConfig(
        n_layers=3, d_model=48, n_heads=6, n_kv_heads=2, rope_base=5e4, window=9, write_mix=0.5, schedule="tile"
    ),
    "alibi": RecurrentTransformerConfig(
        n_layers=2, position="alibi", norm="layer", mlp="gelu", qk_norm="full", tied=True, recurrent_layers=(1,)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_names_say_the_same(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = HFConfig.from_effml(config, eos_token_id=3)
    resolved = replace(config, n_kv_heads=config.kv_heads, d_ff=config.ff_dim, vocab_rows=config.rows)
    assert theirs.to_effml() == resolved
    theirs.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is HFConfig
    assert (read.to_effml(), read.eos_token_id, read.use_cache) == (resolved, 3, True)


def test_sizes_have_the_names_that_tools_look_for() -> None:
    config = HFConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    ours = config.to_effml()
    assert (ours.d_model, ours.n_layers, ours.n_heads, ours.kv_heads) == (64, 3, 8, 2)
    assert (config.intermediate_size, config.vocab_rows, config.tie_word_embeddings) == (ours.ff_dim, 256, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3}, r"n_heads: got 3, expected a divisor of d_model=256"),
        ({"recurrent_layers": [7]}, r"recurrent_layers: got 7, expected a number in \[0, 4\)"),
        ({"backend": "cuda"}, r"backend: got 'cuda', expected one of"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HFConfig(**fields)


def test_a_field_set_later_is_checked_when_used() -> None:
    config = HFConfig()
    config.num_hidden_layers = 0
    with pytest.raises(ConfigError, match=r"n_layers: got 0"):
        config.to_effml()


def test_the_extra_is_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("effml_arch.hugging_face")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effml-arch\[hf\]'"):
        importlib.import_module("effml_arch.hugging_face")


def test_the_package_does_not_import_transformers() -> None:
    subprocess.run(
        [sys.executable, "-c", "import effml_arch, sys; assert 'transformers' not in sys.modules"], check=True
    )
