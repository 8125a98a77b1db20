"""Sparse autoencoders that other libraries trained, as a `SparseAutoencoder` with their codes and reconstructions.

    SAELens              cfg.json, sae_weights.safetensors   standard, topk, jumprelu, batchtopk
    sparsify             cfg.json, sae.safetensors           topk
    dictionary_learning  config.json, ae.safetensors (*)     AutoEncoder, AutoEncoderNew, AutoEncoderTopK, BatchTopKSAE,
                                                             MatryoshkaBatchTopKSAE, JumpReluAutoEncoder
    overcomplete         a state dict as .safetensors (*)    SAE, TopKSAE, BatchTopKSAE, JumpSAE with a linear encoder,
                                                             with batch normalisation or without; not archetypal ones

(*) These store pickles, which are never read here; the error says how to convert one. An overcomplete file does not say
what it is, nor does one of dictionary_learning without its config.json: then `kind` and `k` must be given.

What a library does beyond `Pi((x - c) W^T + b) D + c` is folded into W, b and D, in float64: a pre-bias that is only
added, codes that count in units of atom norms, batch normalisation, the norm of atoms that is divided by. Formats as in
SAELens 6.54, dictionary_learning 0.1.0, overcomplete 0.3.0 and sparsify's public sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor

from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.model_files import read_json, read_safetensors

__all__ = ["load_peer_autoencoder"]

_WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.safetensors")
_OVERCOMPLETE = "dictionary._weights"
_UNIT = 1e-4  # atoms whose norms are this close to 1 are kept there in further training
_CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "s.save_file({n: t.contiguous() for n, t in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
)
Tensors = Mapping[str, Tensor]


@dataclass
class _Parts:
    """An autoencoder in this library's form."""

    kind: str
    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    atoms: Tensor  # (C, d)
    offset: Tensor | None  # (d,), added to the reconstruction
    subtracted: bool = True  # the offset is also taken from x
    k: float | None = None
    threshold: Tensor | None = None  # (C,) or one for all


def load_peer_autoencoder(path: str | Path, *, kind: str | None = None, k: float | None = None) -> SparseAutoencoder:
    """Return an autoencoder of another library, in its dtype, in eval mode.

    A BatchTopK model that brings no threshold needs `calibrate_threshold_` before eval. Rows must be scaled as they
    were in training; atoms of unit norm are kept so by further training, others are left free.

    Args:
        path: a directory of the library, or its .safetensors file.
        kind: `"relu"`, `"topk"`, `"batch_topk"` or `"jumprelu"`, where the files do not say.
        k: active concepts per row, where the files do not say; of BatchTopK, per row and not per batch.

    Raises:
        CheckpointError: nothing there can be read, or it is a pickle.
        ConfigError: the architecture has no counterpart here, or `kind` or `k` is missing or contradicts the files.
    """
    file, config = _files(Path(path))
    tensors = read_safetensors(file)
    try:
        parts = _parts(tensors, config, kind, k)
        if kind is not None and kind != parts.kind:
            raise ConfigError(f"kind: got {kind!r}, expected {parts.kind!r} as the files say")
        dtype = next(tensors[name].dtype for name in ("W_dec", "decoder.weight", _OVERCOMPLETE) if name in tensors)
        return _assemble(parts, dtype)
    except KeyError as error:
        named = ", ".join(sorted(tensors)[:8])
        raise CheckpointError(
            f"{file}: got tensors {named} without {error}, expected those of a known library"
        ) from None
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: got tensors that do not fit together ({str(error).splitlines()[0]})") from None


def _files(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of tensors and what the configuration beside it holds."""
    if path.is_dir():
        file = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        pickles = sorted(found for found in path.iterdir() if found.suffix in (".pt", ".pth", ".bin"))
        if file is None and pickles:
            file = pickles[0]
        if file is None:
            raise CheckpointError(f"{path}: got none of {', '.join(_WEIGHTS)}, expected one of them")
    else:
        file = path
    if file.suffix != ".safetensors":
        how = f"convert it where you trust it: python -c '{_CONVERT}' {file} {file.with_suffix('.safetensors')}"
        raise CheckpointError(f"{file}: got a pickle, which can run code when read, expected .safetensors; {how}")
    for name in ("cfg.json", "config.json"):
        if file.with_name(name).is_file():
            return file, read_json(file.with_name(name))
    return file, {}


def _parts(tensors: Tensors, config: Mapping[str, Any], kind: str | None, k: float | None) -> _Parts:
    if any(name.startswith("dictionary.") for name in tensors):
        return _overcomplete(tensors, kind, k)
    if "encoder.weight" in tensors and "W_dec" in tensors:
        return _sparsify(tensors, config)
    if "W_enc" in tensors and ("architecture" in config or "d_sae" in config):
        return _sae_lens(tensors, config)
    return _dictionary_learning(tensors, config, kind, k)


def _sae_lens(tensors: Tensors, config: Mapping[str, Any]) -> _Parts:
    kinds = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "batch_topk"}
    architecture, k = config.get("architecture", "standard"), config.get("k")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture == "standard" and function == "topk":  # before version 6
        architecture, k, function = "topk", (config.get("activation_fn_kwargs") or {}).get("k"), "relu"
    _expect("architecture", architecture, tuple(kinds))
    if architecture != "topk":
        _expect("activation_fn", function, ("relu",))
    _expect("normalize_activations", config.get("normalize_activations", "none"),
            ("none", "expected_average_only_in", False))  # fmt: skip
    scales = tensors.get("scaling_factor")
    if scales is not None and not bool((scales == 1).all()):
        raise ConfigError("scaling_factor: got factors other than 1, expected a model that was not finetuned by them")
    weight, bias, atoms, threshold = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors.get("threshold")
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = atoms.double().norm(dim=1)
        weight, bias, atoms = weight * norms[:, None], bias * norms, atoms / norms[:, None]
    if architecture == "batchtopk":
        threshold = tensors["topk_threshold"]
    return _Parts(
        kinds[architecture],
        weight,
        bias,
        atoms,
        tensors["b_dec"],
        config.get("apply_b_dec_to_input", True),
        k,
        threshold,
    )


def _sparsify(tensors: Tensors, config: Mapping[str, Any]) -> _Parts:
    _expect("activation", config.get("activation", "topk"), ("topk",))
    for name in ("skip_connection", "embed_skip", "gram_lookup", "transcode"):
        _expect(name, config.get(name, False), (False,))
    encoder = tensors["encoder.weight"], tensors["encoder.bias"]
    return _Parts("topk", *encoder, tensors["W_dec"], tensors["b_dec"], k=config.get("k"))


def _dictionary_learning(tensors: Tensors, config: Mapping[str, Any], kind: str | None, k: float | None) -> _Parts:
    if "gate_bias" in tensors:
        raise ConfigError(
            "dict_class: got a gated autoencoder, expected one of another kind: it has no counterpart here"
        )
    if "W_enc" in tensors:
        matrices = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"]
        threshold = tensors["threshold"]
        if "group_sizes" in tensors:
            return _Parts("batch_topk", *matrices, k=float(tensors["k"]), threshold=threshold)
        return _Parts("jumprelu", *matrices, subtracted=False, threshold=threshold)
    weight, bias, atoms = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T
    if "bias" in tensors:
        return _Parts("relu", weight, bias, atoms, tensors["bias"])
    if "decoder.bias" in tensors:
        return _Parts("relu", weight, bias, atoms, tensors["decoder.bias"], subtracted=False)
    trainer = config.get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    kind = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk"}.get(str(name), kind)
    _expect("kind", kind, ("topk", "batch_topk"))
    k = float(tensors["k"]) if "k" in tensors else k
    return _Parts(str(kind), weight, bias, atoms, tensors["b_dec"], k=k, threshold=tensors.get("threshold"))


def _overcomplete(tensors: Tensors, kind: str | None, k: float | None) -> _Parts:
    vectors = tensors[_OVERCOMPLETE].double()
    multiplier = tensors.get("dictionary.multiplier", torch.zeros(())).double()
    atoms = vectors / (vectors.norm(dim=1, keepdim=True) + 1e-8) * multiplier.exp()
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    linear = ("final_block.0.", "final_block.1.", "weight", "bias", "tied_to.")
    other = next((name for name in encoder if not name.startswith(linear)), None)
    if other is not None:
        raise ConfigError(f"encoder: got one with {other}, expected a single linear layer")
    if "final_block.0.weight" in encoder:
        weight, bias = encoder["final_block.0.weight"].double(), encoder["final_block.0.bias"].double()
        if "final_block.1.weight" in encoder:
            if "final_block.1.running_var" not in encoder:
                raise ConfigError("encoder: got layer normalisation, expected batch normalisation or none")
            mean, variance = (
                encoder["final_block.1.running_mean"].double(),
                encoder["final_block.1.running_var"].double(),
            )
            scale = encoder["final_block.1.weight"].double() / (variance + 1e-5).sqrt()
            weight, bias = weight * scale[:, None], (bias - mean) * scale + encoder["final_block.1.bias"].double()
    else:
        weight = atoms if any(name.startswith("tied_to.") for name in encoder) else encoder["weight"].double()
        bias = encoder.get("bias", weight.new_zeros(len(weight)))
    if "thresholds" in tensors:
        return _Parts("jumprelu", weight, bias, atoms, None, threshold=tensors["thresholds"].double().exp())
    _expect("kind", kind, ("relu", "topk", "batch_topk"))
    return _Parts(str(kind), weight, bias, atoms, None, k=k)


@torch.no_grad()
def _assemble(parts: _Parts, dtype: torch.dtype) -> SparseAutoencoder:
    weight, bias, offset = parts.weight.double(), parts.bias.double(), parts.offset
    if parts.atoms.ndim != 2 or weight.shape != parts.atoms.shape or bias.shape != weight.shape[:1]:
        got = f"{tuple(weight.shape)}, {tuple(bias.shape)} and {tuple(parts.atoms.shape)}"
        raise CheckpointError(f"encoder, bias, atoms: got shapes {got}, expected (C, d), (C,) and (C, d)")
    concepts, dim = parts.atoms.shape
    if offset is not None and offset.shape != (dim,):
        raise CheckpointError(f"decoder's bias: got shape {tuple(offset.shape)}, expected ({dim},)")
    if offset is not None and not parts.subtracted:
        bias = bias + weight @ offset.double()
    used = offset is not None and bool(offset.any())
    unit = bool(((parts.atoms.double().norm(dim=1) - 1).abs() < _UNIT).all())
    if parts.kind in ("topk", "batch_topk") and parts.k is None:
        raise ConfigError(f"k: got None, expected the number of active concepts per row of this {parts.kind} model")
    config = SAEConfig(
        d_in=dim,
        n_concepts=concepts,
        kind=parts.kind,
        k=min(32, concepts) if parts.k is None else parts.k,
        pre_bias=used,
        normalize="project" if unit else "none",
    )
    model = SparseAutoencoder(config).to(dtype)
    model.encoder_weight.copy_(weight)
    model.encoder_bias.copy_(bias)
    model.atoms.copy_(parts.atoms)
    if model.pre_bias is not None and offset is not None:
        model.pre_bias.copy_(offset)
    if parts.kind == "jumprelu" and parts.threshold is not None:
        model.log_threshold.copy_(parts.threshold.double().clamp_min(0).log())  # below 0, the ReLU decides
    if parts.kind == "batch_topk" and parts.threshold is not None and float(parts.threshold) >= 0:
        model.threshold.fill_(float(parts.threshold))
        model.threshold_updates.fill_(1)
    return model.eval()


def _expect(name: str, got: Any, known: tuple[Any, ...]) -> None:
    if got not in known:
        raise ConfigError(f"{name}: got {got!r}, expected {' or '.join(map(repr, known))}")
