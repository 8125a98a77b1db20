"""Concept autoencoders on what other packages' models compute: a Recurrent Transformer and a masked diffusion model."""

import pytest
import torch
from effml_arch import RecurrentTransformer, RecurrentTransformerConfig
from effml_diffusion import DiffusionTransformer, DiffusionTransformerConfig, MaskedDiffusion
from effml_eval import SAEConfig, SparseAutoencoder, measure_concepts, train_sae
from effml_eval.activations import ActivationBuffer, ModuleActivations, hidden_states
from effml_eval.concepts.reconstruction import r2
from effml_eval.sae import SAETrainingConfig
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep, language_model_loss

WIDTH, MASK = 24, 258
TEXT = [f"{i} is followed by {i + 1}. " for i in range(300)]
WINDOWS = PackedDataset(TEXT, ByteTokenizer(), 16)


def fit(model, loss):
    """Train a little, so that activations mean something."""
    step = GradientStep(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loss)
    Loop(step, Loader(WINDOWS), cosine(16, 640), budget=Budget(samples=640)).run()
    return model.eval()


def recurrent():
    config = RecurrentTransformerConfig(n_layers=2, d_model=WIDTH, n_heads=2, d_ff=32, vocab_size=258)
    return fit(RecurrentTransformer(config), language_model_loss), WINDOWS.batch


def diffusion():
    config = DiffusionTransformerConfig(
        n_layers=2, d_model=WIDTH, n_heads=2, d_ff=32, vocab_size=259, conditioning="time", cond_dim=16
    )
    model = DiffusionTransformer(config)
    objective = MaskedDiffusion(model, mask_id=MASK, time_conditioning=True)
    fit(model, lambda model, batch: objective.loss_terms(model, {"input_ids": batch["input_ids"]}))

    def masked(indices):
        """Half of each text masked, the same half at every call, as the network would see it at time 1/2."""
        ids = WINDOWS.batch(indices)["input_ids"]
        seeded = torch.Generator().manual_seed(int(indices[0]))
        corruption = objective.corrupt(ids, mask_level=0.5, generator=seeded)
        return {"input_ids": corruption.z, "t": corruption.t.float()}

    return model, masked


class Inputs:
    """Windows as a model takes them, for `ActivationBuffer`."""

    def __init__(self, batch):
        self.batch = batch
        self.fingerprint = WINDOWS.fingerprint

    def __len__(self):
        return len(WINDOWS)


@pytest.fixture(scope="module", params=[recurrent, diffusion], ids=["recurrent", "diffusion"])
def watched(request):
    return request.param()


def test_hook_points_see_what_the_model_computes_and_leave_it_as_it_was(watched):
    model, batch = watched
    inputs = batch(torch.arange(4).numpy())
    states = hidden_states(model, inputs, ["model.layers.0", "model.layers.1:input", "model.norm", "lm_head:input"])
    assert all(state.shape == (4, 16, WIDTH) for state in states.values())
    assert torch.equal(states["model.layers.0"], states["model.layers.1:input"])
    taken = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        logits, ours = model(**taken).logits, model.lm_head(states["lm_head:input"])
    real = logits.isfinite()  # rows of the head beyond the vocabulary are masked
    torch.testing.assert_close(ours[real], logits[real], rtol=0, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dictionary_learns_the_residual_stream_and_resumes(watched, tmp_path):
    model, batch = watched
    rows = ModuleActivations(model, "model.layers.1")

    def trained():
        sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, n_concepts=96, kind="batch_topk", k=8, pre_bias=True))
        buffer = ActivationBuffer(rows, Inputs(batch), block_inputs=64)
        sae.start_pre_bias_(rows(batch(torch.arange(32).numpy())))
        config = SAETrainingConfig(steps=200, batch_size=256, lr=5e-3, warmup=0.0)
        return sae, train_sae(sae, buffer, config, directory=tmp_path)

    sae, result = trained()
    assert result.clock.step == 200
    held_out = rows(batch(torch.arange(len(WINDOWS) - 32, len(WINDOWS)).numpy()))
    even, odd = held_out[::2], held_out[1::2]
    with torch.no_grad():
        explained = r2(held_out, sae.decode(sae.encode(held_out)))
        report = measure_concepts(sae.encode(even), sae.encode(odd), sae.dictionary, images=even, texts=odd)
    assert 0.9 < explained <= 1.0  # of the variance around the mean
    assert len(report.bridges) > 0
    again, rest = trained()  # nothing is left to do: what was saved comes back
    assert rest.history == []
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True))
