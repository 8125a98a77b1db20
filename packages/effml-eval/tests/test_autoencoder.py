"""The model: state, consistency of training and eval, normalisation, every kind from its definition."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from effml_eval.sae.archetypal import ArchetypalDictionary
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import KINDS, SAEConfig
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.training import DictionaryStep
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.schedules import Plan


def build(kind="batch_topk", dtype=torch.float64, **fields):
    options = {"d_in": 8, "n_concepts": 24, "k": 3, "dead_after": 40, "initial_threshold": 0.2, "bandwidth": 0.3}
    return SparseAutoencoder(SAEConfig(kind=kind, **{**options, **fields})).to(dtype)


def data(rows=16, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=g, dtype=torch.float64), dim=1).to(dtype)


def dense(codes):
    return codes.dense() if isinstance(codes, SparseCodes) else codes


def train(sae, steps=6, lr=1e-2, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(sae.parameters(), lr=lr)
    for step in range(steps):
        output = sae(data(seed=step).to(next(sae.parameters()).dtype))
        optimizer.zero_grad()
        output.loss.backward()
        sae.before_step_()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step_(output)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pre_bias", [False, True])
def test_forward_is_encode_then_decode(kind, pre_bias):
    sae = build(kind, pre_bias=pre_bias, aux_alpha=0.0)
    if pre_bias:
        torch.nn.init.normal_(sae.pre_bias, std=0.3)
    x = data()
    output = sae(x)
    codes = sae.encode(x)
    assert torch.equal(dense(codes), dense(output.codes))
    expected = dense(codes) @ sae.dictionary + (sae.pre_bias if pre_bias else 0)
    torch.testing.assert_close(output.x_hat, expected)
    torch.testing.assert_close(sae.decode(codes), expected)
    torch.testing.assert_close(output.loss, (x - expected).square().sum(1).mean())
    assert (output.pre is None) == isinstance(codes, SparseCodes)
    folded = sae(x.reshape(2, 8, 8))
    torch.testing.assert_close(folded.x_hat, output.x_hat.reshape(2, 8, 8))
    torch.testing.assert_close(folded.loss, output.loss)
    assert dense(folded.codes).shape == (2, 8, 24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["project", "graph"])
def test_training_learns_and_forward_changes_no_state(kind, normalize):
    sae = build(kind, normalize=normalize, sparsity_weight=1e-3)
    start = float(sae(data()).losses["reconstruction"])
    before = copy.deepcopy(sae.state_dict())
    sae(data())
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    train(sae, 60)
    assert float(sae(data()).losses["reconstruction"]) < 0.8 * start
    torch.testing.assert_close(
        sae.dictionary.detach().norm(dim=1), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert int(sae.steps) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_makes_a_fresh_model_equal(kind):
    sae = build(kind)
    train(sae)
    fresh = build(kind, seed=7)
    fresh.load_state_dict(sae.state_dict())
    for model in (sae, fresh):
        model.eval()
    x = data(seed=9)
    assert torch.equal(fresh(x).x_hat, sae(x).x_hat)
    for model in (sae, fresh):
        model.train()
    assert torch.equal(fresh(x).loss, sae(x).loss)


def test_eval_and_back_leave_training_as_it_was():
    one, other = build(), build()
    train(one, 3)
    train(other, 3)
    other.eval()
    other(data(seed=5))
    other.train()
    assert torch.equal(one(data(seed=6)).loss, other(data(seed=6)).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_is_the_least_code_while_batches_stay_the_same(dtype):
    """At every t, by the correction of the bias; being compared strictly, that one code is dropped in eval."""
    sae, x = build(dtype=dtype), data(dtype=dtype)
    for t in range(1, 30):
        output = sae(x)
        sae.after_step_(output)
        values = output.codes.values[output.codes.values > 0]
        assert float(sae.threshold) == float(values.detach().min())
        assert int(sae.threshold_updates) == t
    sae.eval()
    kept = dense(output.codes) * (dense(output.codes) > values.min())
    assert torch.equal(dense(sae.encode(x)), kept)
    assert int((kept > 0).sum()) == 3 * 16 - 1


def test_threshold_is_the_bias_corrected_mean():
    sae = build(threshold_decay=0.9)
    mean = 0.0
    for t in range(1, 8):
        output = sae(data(seed=t))
        values = output.codes.values.detach()
        sae.after_step_(output)
        mean = 0.9 * mean + 0.1 * float(values[values > 0].min())
        assert float(sae.threshold) == pytest.approx(mean / (1 - 0.9**t), rel=1e-12)
    nothing = output._replace(codes=SparseCodes(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64), 24))
    sae.after_step_(nothing)
    assert int(sae.threshold_updates) == 7
    assert float(sae.threshold) == pytest.approx(mean / (1 - 0.9**7), rel=1e-12)


def test_threshold_and_k_stay_wide_when_the_model_narrows():
    sae = build(dtype=torch.float32, k=2.7)
    train(sae, 3)
    threshold = float(sae.threshold)
    sae.to(torch.bfloat16)
    assert sae.atoms.dtype == torch.bfloat16
    assert float(sae.threshold) == threshold
    assert sae.k.dtype == torch.float32
    sae.eval()
    assert sae(data(dtype=torch.bfloat16)).x_hat.dtype == torch.bfloat16
    sae.to("meta")
    assert sae.to_empty(device="cpu").threshold.device.type == "cpu"


def test_calibrated_threshold_gives_the_trained_density():
    sae = build()
    with pytest.raises(ConfigError, match=r"threshold: got none yet"):
        sae.eval()(data())
    sae.calibrate_threshold_([data(400, seed=s) for s in range(3)])
    assert float((sae.encode(data(400, seed=8)).values > 0).sum()) / 400 == pytest.approx(3, abs=0.3)
    with pytest.raises(ConfigError, match=r"batches: got no positive"):
        sae.calibrate_threshold_([torch.zeros(3, 8)])
    with pytest.raises(ConfigError, match=r"kind: got 'topk'"):
        build("topk").calibrate_threshold_([data()])


def test_firing_counters_count_samples():
    sae = build("topk", dead_after=33)
    fired = torch.zeros(24, dtype=torch.bool)
    for t in range(1, 4):
        output = sae(data(2, seed=t))
        sae.after_step_(output._replace(codes=SparseCodes(output.codes.values.relu(), output.codes.indices, 24)))
        fired |= (dense(output.codes) > 0).any(0)
        assert torch.equal(sae.samples_since_fired == 2 * t, ~fired)
    empty = SparseCodes(torch.zeros(5, 0), torch.zeros(5, 0, dtype=torch.int64), 24)
    sae.after_step_(output._replace(codes=empty))
    assert torch.equal(sae.samples_since_fired == 11, ~fired)
    sae.samples_since_fired.add_(33 - 11)
    assert torch.equal(sae.dead[~fired], torch.ones(int((~fired).sum()), dtype=torch.bool))
    assert "revival" in sae(data()).losses
    assert "revival" not in sae.eval()(data()).losses


def test_gradients_before_a_projection_are_tangential():
    sae, graph = build("topk"), build("topk", normalize="graph")
    with torch.no_grad():  # they were drawn in float32
        for model in (sae, graph):
            model.atoms.copy_(F.normalize(model.atoms, dim=1))
    sae(data()).loss.backward()
    dense_gradient = sae.atoms.grad.clone()
    sae.before_step_()
    along = (dense_gradient * sae.atoms.detach()).sum(1, keepdim=True) * sae.atoms.detach()
    torch.testing.assert_close(sae.atoms.grad, dense_gradient - along)
    graph(data()).loss.backward()
    torch.testing.assert_close(graph.atoms.grad, sae.atoms.grad, rtol=1e-6, atol=1e-9)
    sae.zero_grad()
    sae.before_step_()


def test_vectors_under_the_norm_are_renormalised_in_time(monkeypatch):
    monkeypatch.setattr("effml_eval.sae.autoencoder._RENORMALIZE", 4)
    sae = build("topk", normalize="graph")
    train(sae, 3)
    assert float((sae.atoms.detach().norm(dim=1) - 1).abs().max()) > 1e-6
    train(sae, 1)
    torch.testing.assert_close(sae.atoms.detach().norm(dim=1), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-6)


def test_sparsity_losses():
    x = data()
    relu = build("relu", sparsity_weight=0.5, normalize="none")
    with torch.no_grad():
        relu.atoms.mul_(3)
    output = relu(x)
    l1 = 3 * output.codes.sum(1).mean()
    torch.testing.assert_close(output.losses["sparsity"], l1.detach())
    torch.testing.assert_close(output.loss, output.losses["reconstruction"] + 0.5 * l1)
    jump = build("jumprelu", sparsity_weight=0.5)
    l0 = (jump(x).codes > 0).sum(1).double().mean()
    torch.testing.assert_close(jump(x).losses["sparsity"], l0)
    jump(x).loss.backward()
    assert float(jump.log_threshold.grad.abs().sum()) > 0
    aimed = build("jumprelu", sparsity_weight=0.5, l0_target=2.0)
    output = aimed(x)
    torch.testing.assert_close(output.losses["sparsity"], (l0 / 2 - 1).square())
    (slope,) = torch.autograd.grad(output.loss, aimed.log_threshold)
    plain = build("jumprelu", sparsity_weight=0.5)
    reconstruction = build("jumprelu")
    slopes = [torch.autograd.grad(model(x).loss, model.log_threshold)[0] for model in (plain, reconstruction)]
    torch.testing.assert_close(slope, slopes[1] + (slopes[0] - slopes[1]) * float(l0 / 2 - 1))


def test_archetypal_atoms_in_any_encoder():
    points = data(30, seed=3)
    for kind in ("batch_topk", "topk", "relu", "jumprelu"):
        config = SAEConfig(d_in=8, n_concepts=24, k=3, kind=kind, normalize="none")
        sae = SparseAutoencoder(config, dictionary=ArchetypalDictionary(points, 24, delta=0.1)).double()
        train(sae, 5)
        torch.testing.assert_close(sae.archetypes.weights.sum(1).detach(), torch.ones(24, dtype=torch.float64))
        assert float(sae.archetypes.relaxation.detach().norm(dim=1).max()) <= 0.1 * (1 + 1e-6)
        assert "atoms" not in dict(sae.named_parameters())
    with pytest.raises(ConfigError, match=r"dictionary: got atoms \(24, 8\) and 'project'"):
        SparseAutoencoder(SAEConfig(d_in=8, n_concepts=24, k=3), dictionary=ArchetypalDictionary(points, 24))
    with pytest.raises(ConfigError, match=r"dictionary: got atoms \(9, 8\)"):
        SparseAutoencoder(config, dictionary=ArchetypalDictionary(points, 9))


def test_bad_inputs_are_refused():
    sae = build()
    with pytest.raises(ConfigError, match=r"x: got shape \(3, 7\), expected \(..., 8\)"):
        sae(torch.ones(3, 7))
    with pytest.raises(ConfigError, match=r"x: got NaN"):
        sae(torch.full((3, 8), torch.nan))
    assert float(sae(data()[:0]).loss.detach()) == 0
    for codes in (SparseCodes(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), 23), torch.ones(2, 25)):
        with pytest.raises(ConfigError, match=r"^codes: got 2[35] concepts, expected 24"):
            sae.decode(codes)
    with torch.no_grad():
        sae.encoder_weight[3] = torch.nan
    for training in (True, False):
        sae.threshold_updates.fill_(1)
        with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN"):
            sae.train(training).encode(data())


@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
def test_float32_training_follows_float64(kind):
    """The screened kernels and the plain ones take the same path."""
    losses = [float(train(build(kind, dtype), 20).loss.detach()) for dtype in (torch.float32, torch.float64)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it goes on after a graph break
def test_compiled_model_and_autocast():
    sae, x = build(dtype=torch.float32), data(dtype=torch.float32)
    compiled = torch.compile(sae, backend="eager")
    torch.testing.assert_close(compiled(x).x_hat, sae(x).x_hat)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sae(x.bfloat16()).loss, sae(x.bfloat16().float()).loss, rtol=1e-2, atol=1e-2)
        relu = build("relu", dtype=torch.float32, dead_after=1)
        relu.samples_since_fired += 1
        output = relu(x)
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        assert "revival" in output.losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_told_in_training_and_in_eval(kind):
    """Atoms or encoder rows that overflow must not pass for concepts that are silent."""
    sae = build(kind, dtype=torch.float32)
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e38)
    step = DictionaryStep(sae, optimizer, clip_norm=None)

    def diverge():
        for seed in range(3):
            step(data(seed=seed, dtype=torch.float32), Plan(16))

    with pytest.raises(NonFiniteError, match=r"NaN or infinity|non-finite loss"):
        diverge()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_inputs(kind, dtype):
    """One row, no rows, no batch dimension, strides, other dtypes, k of 1 and of all."""
    wide = data(6).reshape(8, 6).T  # not contiguous
    for k in (1, 24):
        sae = build(kind, dtype=dtype, k=k, dead_after=1)
        for x in (wide, wide.bfloat16(), data(1), data(0), data(1)[0], data(6).reshape(2, 3, 8), torch.zeros(3, 8)):
            output = sae.train()(x)
            output.loss.backward()
            sae.before_step_()
            sae.after_step_(output)
            assert output.x_hat.shape == x.shape
            assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)
            assert sae.eval()(x).x_hat.shape == x.shape


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "matching_pursuit"])
def test_k_anneals_and_is_part_of_the_state(kind):
    options = {"k": 2, "k_start": 10, "k_steps": 4}
    sae = build(kind, **options)
    widths = []
    for seed in range(6):
        output = sae(data(seed=seed))
        widths.append(float((output.codes.values > 0).sum()) / 16)
        sae.after_step_(output)
        if seed == 1:
            halfway = copy.deepcopy(sae.state_dict())
    assert float(sae.k) == 2
    if kind == "batch_topk":
        assert widths == [10, 8, 6, 4, 2, 2]
    assert widths[0] > widths[2] > widths[4] == widths[5]
    fresh = build(kind, seed=3, **options)
    fresh.load_state_dict(halfway)
    for seed in range(2, 6):
        output = fresh(data(seed=seed))
        assert float((output.codes.values > 0).sum()) / 16 == widths[seed]
        fresh.after_step_(output)


def test_the_pre_bias_starts_at_the_geometric_median():
    sae = build(pre_bias=True, dtype=torch.float32)
    rows = 0.1 * data(64, dtype=torch.float32) + torch.arange(8.0)
    rows[0] = 1e4  # which the mean would follow
    sae.start_pre_bias_(rows.reshape(8, 8, 8))
    torch.testing.assert_close(sae.pre_bias.detach(), torch.arange(8.0), rtol=0, atol=0.05)
    sae.start_pre_bias_(torch.ones(5, 8))  # every row is the median: nothing is divided by 0
    assert sae.pre_bias.tolist() == [1.0] * 8
    for bad in (torch.full((3, 8), torch.nan), torch.ones(3, 7), torch.ones(0, 8)):
        with pytest.raises(ConfigError, match=r"^x: got"):
            sae.start_pre_bias_(bad)
    with pytest.raises(ConfigError, match=r"^pre_bias: got False"):
        build().start_pre_bias_(data())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_come_back_whole(tmp_path, kind, dtype):
    sae = build(kind, dtype=dtype, pre_bias=kind != "relu", k_start=5 if "topk" in kind else None,
                k_steps=9 if "topk" in kind else 0)  # fmt: skip
    train(sae, 4)
    sae.save_pretrained(tmp_path / "sae")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert loaded.config == sae.config
    assert not loaded.training
    for name, value in sae.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    x = data(seed=9, dtype=dtype)
    assert torch.equal(loaded(x).x_hat, sae.eval()(x).x_hat)
    for model in (loaded, sae):  # and training goes on alike
        train(model.train(), 1)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())


def test_saved_archetypal_models_come_back(tmp_path):
    config = SAEConfig(d_in=8, n_concepts=24, k=3, kind="topk", normalize="none")
    sae = SparseAutoencoder(config, dictionary=ArchetypalDictionary(data(30, seed=3), 24, delta=0.1)).double()
    train(sae, 3)
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.archetypes.delta == 0.1
    assert torch.equal(loaded.dictionary, sae.dictionary)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, r"got a model of kind 'bert'"),
        ({"config": {}}, r"missing 1 required"),
        ({"config": {"d_in": 8, "n_concepts": 25, "k": 3}}, r"atoms \(24, 8\) for 25 concepts of 8"),
        ({"config": {"d_in": 8, "n_concepts": 10**9, "k": 3}}, r"for 1000000000 concepts"),
        ({"config": {"d_in": 8, "n_concepts": 24, "k": "many"}}, r"not supported between"),
        ({"config": {"d_in": 8, "n_concepts": 24, "kk": 3}}, r"unexpected keyword argument 'kk'"),
        ({"config": {"d_in": 8, "n_concepts": 24, "kind": "jumprelu"}}, r"log_threshold"),
        ({"config": None}, r"must be a mapping"),
        ({"archetypal_delta": 1.0}, r"archetypes.relaxation"),
    ],
)
def test_saved_models_that_do_not_fit_together_are_refused(tmp_path, fields, message):
    build("topk").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=message) as error:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
