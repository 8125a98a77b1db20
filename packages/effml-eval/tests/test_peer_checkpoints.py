"""Checkpoints in the layouts of other libraries, written by hand, against their formulas written out densely."""

import json

import pytest
import torch
from effml_eval.sae.peer_checkpoints import load_peer_autoencoder
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import CheckpointError, ConfigError
from safetensors.torch import save_file

D, C, K = 6, 20, 4
G = torch.Generator().manual_seed(0)
X = torch.randn(9, D, generator=G)
W, A = torch.randn(C, D, generator=G), 0.7 * torch.randn(C, D, generator=G)
B, OFFSET, THRESHOLD = (torch.randn(n, generator=G) * 0.3 for n in (C, D, C))


def write(directory, name, tensors, config=None, config_name="cfg.json"):
    directory.mkdir(exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, directory / name)
    if config is not None:
        (directory / config_name).write_text(json.dumps(config))
    return directory


def check(model, codes, reconstruction, x=X):
    assert not model.training
    found = model.encode(x)
    dense = found.dense() if isinstance(found, SparseCodes) else found
    torch.testing.assert_close(dense.detach(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(found).detach(), reconstruction, rtol=1e-5, atol=1e-5)


def largest(p, k=K):
    """Zero all but the k largest of each row."""
    top = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, top.indices, top.values)


LENS = {"W_enc": W.T, "b_enc": B, "W_dec": A, "b_dec": OFFSET}
LENS_CONFIG = {"d_in": D, "d_sae": C, "normalize_activations": "none", "apply_b_dec_to_input": True}


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_sae_lens(tmp_path, architecture, applied, rescaled):
    more = {"jumprelu": {"threshold": THRESHOLD}, "batchtopk": {"topk_threshold": torch.tensor(0.4).double()}}
    config = {**LENS_CONFIG, "architecture": architecture, "apply_b_dec_to_input": applied, "k": K}
    norms = torch.ones(C)
    if rescaled and architecture in ("topk", "batchtopk"):
        config["rescale_acts_by_decoder_norm"] = True
        norms = A.norm(dim=1)
    path = write(tmp_path / "sae", "sae_weights.safetensors", {**LENS, **more.get(architecture, {})}, config)
    p = ((X - OFFSET * applied) @ W.T + B) * norms
    z = {
        "standard": p.relu(),
        "topk": largest(p).relu(),
        "jumprelu": p.relu() * (p > THRESHOLD),
        "batchtopk": p.relu() * (p > 0.4),
    }[architecture]
    model = load_peer_autoencoder(path)
    check(model, z, (z / norms) @ A + OFFSET)
    assert model.config.normalize == ("project" if float(norms[0]) != 1 else "none")


def test_sae_lens_before_version_six(tmp_path):
    old = {"d_in": D, "d_sae": C, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    path = write(tmp_path / "sae", "sae_weights.safetensors", {**LENS, "scaling_factor": torch.ones(C)}, old)
    z = largest((X - OFFSET) @ W.T + B).relu()
    check(load_peer_autoencoder(path), z, z @ A + OFFSET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparsify(tmp_path, dtype):
    tensors = {"encoder.weight": W, "encoder.bias": B, "W_dec": A, "b_dec": OFFSET}
    config = {"activation": "topk", "k": K, "num_latents": 0, "expansion_factor": 4, "d_in": D, "transcode": False}
    path = write(tmp_path / "sae", "sae.safetensors", {n: t.to(dtype) for n, t in tensors.items()}, config)
    model = load_peer_autoencoder(path)
    assert model.atoms.dtype == dtype
    if dtype != torch.bfloat16:
        z = largest((X - OFFSET) @ W.T + B).relu().to(dtype)
        check(model, z, z @ A.to(dtype) + OFFSET.to(dtype))


LINEAR = {"encoder.weight": W, "encoder.bias": B, "decoder.weight": A.T}


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_with_linear_layers(tmp_path, name):
    offset = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    k = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.4)} if offset == "b_dec" else {}
    config = {"trainer": {"dict_class": name, "k": K}}
    path = write(tmp_path / "ae", "ae.safetensors", {**LINEAR, offset: OFFSET, **k}, config, "config.json")
    p = (X - OFFSET * (name != "AutoEncoderNew")) @ W.T + B
    z = {"AutoEncoderTopK": largest(p.relu()), "BatchTopKSAE": p.relu() * (p > 0.4)}.get(name, p.relu())
    check(load_peer_autoencoder(path), z, z @ A + OFFSET)
    if offset == "b_dec":
        (path / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"^kind: got None, expected 'topk' or 'batch_topk'"):
            load_peer_autoencoder(path)
        kind = "topk" if name == "AutoEncoderTopK" else "batch_topk"
        check(load_peer_autoencoder(path / "ae.safetensors", kind=kind), z, z @ A + OFFSET)


@pytest.mark.parametrize("matryoshka", [True, False])
def test_dictionary_learning_with_matrices(tmp_path, matryoshka):
    more = {"k": torch.tensor(K), "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([8, 12])}
    path = write(tmp_path / "ae", "ae.safetensors", {**LENS, **(more if matryoshka else {"threshold": THRESHOLD})})
    p = (X - OFFSET * matryoshka) @ W.T + B
    z = p.relu() * (p > (0.4 if matryoshka else THRESHOLD))
    check(load_peer_autoencoder(path), z, z @ A + OFFSET)


def test_a_threshold_that_was_never_set_is_none(tmp_path):
    tensors = {**LINEAR, "b_dec": OFFSET, "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    model = load_peer_autoencoder(write(tmp_path / "ae", "ae.safetensors", tensors), kind="batch_topk")
    with pytest.raises(ConfigError, match=r"^threshold: got none yet"):
        model.encode(X)
    model.calibrate_threshold_([X])
    assert float((model.encode(X).values > 0).sum()) == K * len(X) - 1


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_overcomplete(tmp_path, kind, normalized):
    tensors = {"dictionary._weights": A, "dictionary.multiplier": torch.tensor(0.3)}
    tensors |= {"encoder.final_block.0.weight": W, "encoder.final_block.0.bias": B}
    p = X @ W.T + B
    if normalized:
        gain, shift, mean, variance = (torch.rand(C, generator=torch.Generator().manual_seed(s)) for s in range(4))
        named = {"weight": gain, "bias": shift, "running_mean": mean, "running_var": variance}
        tensors |= {f"encoder.final_block.1.{name}": tensor for name, tensor in named.items()}
        p = (p - mean) / (variance + 1e-5).sqrt() * gain + shift
    if kind == "jumprelu":
        tensors["thresholds"] = THRESHOLD
    path = write(tmp_path / "sae", "sae.safetensors", tensors)
    z = {"relu": p.relu(), "topk": largest(p.relu()), "jumprelu": p * (p > THRESHOLD.exp())}[kind]
    model = load_peer_autoencoder(path, kind=kind, k=K if kind == "topk" else None)
    check(model, z, z @ (A / A.norm(dim=1, keepdim=True)) * torch.tensor(0.3).exp())


@pytest.mark.parametrize("tied", [True, False])
def test_overcomplete_with_a_bare_encoder(tmp_path, tied):
    atoms = A / A.norm(dim=1, keepdim=True)
    encoder = {"encoder.tied_to._weights": A} if tied else {"encoder.weight": W, "encoder.bias": B}
    path = write(tmp_path / "sae", "sae.safetensors", {"dictionary._weights": A, **encoder})
    z = (X @ (atoms if tied else W).T + (0 if tied else B)).relu()
    check(load_peer_autoencoder(path, kind="relu"), z, z @ atoms)


def test_what_has_no_counterpart_is_refused(tmp_path):
    for number, (tensors, config, message) in enumerate(
        [
            (LENS, {**LENS_CONFIG, "architecture": "gated"}, r"^architecture: got 'gated', expected 'standard' or"),
            (LENS, {**LENS_CONFIG, "normalize_activations": "layer_norm"}, r"^normalize_activations: got 'layer_norm'"),
            (LENS, {**LENS_CONFIG, "activation_fn": "tanh-relu"}, r"^activation_fn: got 'tanh-relu'"),
            ({**LENS, "scaling_factor": W[:, 0]}, LENS_CONFIG, r"^scaling_factor: got factors other than 1"),
            ({**LINEAR, "gate_bias": B}, None, r"gated autoencoder"),
            (
                {"dictionary._weights": A, "encoder.mlp_blocks.0.0.weight": W},
                None,
                r"^encoder: got one with mlp_blocks",
            ),
            ({"dictionary._weights": A, "encoder.weight": W}, None, r"^kind: got None, expected 'relu' or"),
        ]
    ):
        path = write(tmp_path / str(number), "sae_weights.safetensors", tensors, config)
        with pytest.raises(ConfigError, match=message):
            load_peer_autoencoder(path)
    path = write(
        tmp_path / "k", "sae.safetensors", {"encoder.weight": W, "encoder.bias": B, "W_dec": A, "b_dec": OFFSET}
    )
    with pytest.raises(ConfigError, match=r"^k: got None"):
        load_peer_autoencoder(path)
    (path / "cfg.json").write_text(json.dumps({"k": K, "skip_connection": True}))
    with pytest.raises(ConfigError, match=r"^skip_connection: got True, expected False"):
        load_peer_autoencoder(path)
    (path / "cfg.json").write_text(json.dumps({"k": K}))
    with pytest.raises(ConfigError, match=r"^kind: got 'relu', expected 'topk' as the files say"):
        load_peer_autoencoder(path, kind="relu")


def test_what_cannot_be_read_is_told_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"got none of sae_weights.safetensors"):
        load_peer_autoencoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        load_peer_autoencoder(tmp_path / "missing.safetensors")
    torch.save({"encoder.weight": W}, tmp_path / "ae.pt")
    for path in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(CheckpointError, match=r"ae.pt: got a pickle, which can run code") as error:
            load_peer_autoencoder(path)
        assert "\n" not in str(error.value)
    for number, (tensors, message) in enumerate(
        [
            ({"x": W}, r"got tensors x without 'encoder.weight'"),
            ({**LENS, "threshold": THRESHOLD, "b_enc": B[:3]}, r"got shapes"),
            ({**LENS, "threshold": THRESHOLD[:3]}, r"do not fit together"),
            ({**LENS, "threshold": THRESHOLD, "W_dec": B}, r"do not fit together|got shapes"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            load_peer_autoencoder(write(tmp_path / str(number), "ae.safetensors", tensors))
