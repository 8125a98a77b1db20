"""The core's loop on somebody else's model: a Hugging Face Llama with tied weights, SOAP, a kill-and-resume."""

import pytest
import torch
from effml_optim import SOAP, split_params
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.generation import generate
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.tensors import cross_entropy_sum

transformers = pytest.importorskip("transformers")


def loss(model, batch):
    return cross_entropy_sum(model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])


def train(samples, directory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    step = GradientStep(model, SOAP(split_params(model), lr=0.02), loss, micro_batch=3)
    data = Loader(PackedDataset([f"{i} is followed by {i + 1}. " for i in range(300)], ByteTokenizer(), 32))
    loop = Loop(step, data, cosine(6, 240), budget=Budget(samples=samples), checkpoints=Checkpoints(directory))
    loop.run()
    return model


def test_it_learns_resumes_bit_by_bit_and_generates(tmp_path):
    whole = train(240, tmp_path / "whole")
    train(90, tmp_path / "parts")
    resumed = train(240, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    batch = PackedDataset(["41 is followed by 42. "] * 4, ByteTokenizer(), 32).batch(torch.arange(2).numpy())
    with torch.no_grad():
        loss_sum, count = loss(resumed, batch)
    assert float(loss_sum / count) < 3.0  # log(258) = 5.55 at the start
    prompt = torch.tensor([list(b"41 is followed"), list(b"17 is followed")])
    assert generate(resumed, prompt, max_new_tokens=4).ids.shape == (2, 18)
