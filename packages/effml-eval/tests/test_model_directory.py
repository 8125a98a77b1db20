from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_eval.evaluation.model_directory import load_model
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import CheckpointError
from effml_shared.transformer import Transformer, TransformerConfig

SHAPE: dict[str, Any] = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16}
CONFIG = {"training": {"model": SHAPE, "data": {"corpus": "stdlib", "tokenizer": "byte"}}, "name": "x"}


def save(folder: Path, config: Any = CONFIG) -> Transformer:
    model = Transformer(TransformerConfig(**SHAPE, vocab_size=258), seed=1)
    Checkpoints(folder / "checkpoints" / "trial").save(3, {"step": {"model": model.state_dict()}})
    if config is not None:
        (folder / "config.yaml").write_text(config if isinstance(config, str) else json.dumps(config))
    return model


def test_checkpoints_of_a_run(tmp_path: Path) -> None:
    expected = save(tmp_path).state_dict()
    model, tokenizer = load_model(tmp_path / "checkpoints" / "trial")
    assert tokenizer.name == "byte"
    assert not model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"got no config.yaml"),
        ({"model": SHAPE}, r"got no tokenizer in config.yaml"),
        ({"data": {"tokenizer": "byte"}}, r"got no shape of a Transformer"),
        ({"model": {**SHAPE, "d_ff": 8}, "data": {"tokenizer": "byte"}}, r"got no Transformer of that shape \(Error"),
        ({"model": {**SHAPE, "n_heads": 3}, "data": {"tokenizer": "byte"}}, r"n_heads: got 3"),
        ("a: [1", r"expected a readable YAML file"),
        ("- a", r"got no tokenizer"),
    ],
)
def test_runs_that_do_not_fit(tmp_path: Path, config: Any, message: str) -> None:
    save(tmp_path, config)
    with pytest.raises(CheckpointError, match=message) as found:
        load_model(tmp_path / "checkpoints" / "trial")
    assert "\n" not in str(found.value)


def test_damaged_and_absent_models(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "checkpoints" / "trial" / "step-00000003" / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        load_model(tmp_path / "checkpoints" / "trial")
    with pytest.raises(CheckpointError, match=r"got a directory without a model"):
        load_model(tmp_path)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    saved = transformers.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, "byte")
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert tokenizer.name == "byte"
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model .*: got ") as found:
        load_model(tmp_path, "byte")
    assert "\n" not in str(found.value)
