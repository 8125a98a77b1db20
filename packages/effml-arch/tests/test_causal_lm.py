from __future__ import annotations

import itertools
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig, set_write_mix
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("effml_arch.hugging_face", exc_type=ImportError)
HFConfig = hugging_face.HFRecurrentTransformerConfig
CausalLM = hugging_face.RecurrentTransformerForCausalLM

TINY = RecurrentTransformerConfig(
    n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
)
VARIANTS = {
    "rope": TINY,
    "alibi": replace(TINY, position="alibi", norm="layer", mlp="gelu", qk_norm="full", window=6),
    "hybrid": replace(TINY, recurrent_layers=(1,), tied=True),
}


@pytest.fixture(params=VARIANTS)
def ours(request: pytest.FixtureRequest) -> RecurrentTransformer:
    return RecurrentTransformer(VARIANTS[request.param], seed=1).double().eval()


@pytest.fixture
def model(ours: RecurrentTransformer) -> Any:
    return CausalLM.from_effml(ours)


def random_ids(batch: int = 2, seq: int = 12, seed: int = 0, vocab: int = 50) -> Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 2, seq: int = 12, pads: int = 5) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, :pads] = 0
    return random_ids(batch, seq), mask


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# One model, two classes.


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_new_model_is_a_recurrent_transformer_of_the_current_seed(config: RecurrentTransformerConfig) -> None:
    torch.manual_seed(7)
    theirs, expected = CausalLM(HFConfig.from_effml(config)).state_dict(), RecurrentTransformer(config, seed=7)
    assert theirs.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(theirs[name], tensor)
    torch.manual_seed(8)
    weight = "model.embed_tokens.weight"
    assert not torch.equal(CausalLM(HFConfig.from_effml(config)).state_dict()[weight], theirs[weight])


def test_both_classes_share_parameters(ours: RecurrentTransformer, model: Any) -> None:
    back = model.to_effml()
    assert not model.training
    assert not back.training
    assert isinstance(back, RecurrentTransformer)
    for parameters in zip(ours.parameters(), model.parameters(), back.parameters(), strict=True):
        assert len({id(parameter) for parameter in parameters}) == 1
    assert torch.equal(back(random_ids()).logits, ours(random_ids()).logits)
    copied = deepcopy(model)
    nn.init.zeros_(model.model["norm"].weight)
    assert copied(random_ids()).logits.any()
    assert not back(random_ids()).logits[..., :50].any()


@torch.no_grad()
def test_outputs_are_ours(ours: RecurrentTransformer, model: Any) -> None:
    ids, mask = left_padded()
    expected = ours(ids, attention_mask=mask, hidden_states=True)
    logits = expected.logits[..., :50]
    for cached in (True, False):
        output = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=cached)
        assert torch.equal(output.logits, logits)
        for got, state in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(got, state)
        assert (output.past_key_values is not None) is cached
    assert model(ids, use_cache=False).hidden_states is None
    close(model(ids, attention_mask=mask, logits_to_keep=3).logits, logits[:, -3:])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask).logits, logits)
    as_tuple = model(ids, attention_mask=mask, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], logits)
    shifted = model(ids, position_ids=torch.arange(3, 15)[None]).logits  # both see differences of positions only
    torch.testing.assert_close(shifted, model(ids).logits, rtol=0, atol=1e-10)


def test_a_replaced_head_is_called() -> None:
    model = CausalLM(HFConfig.from_effml(TINY))
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    assert model(random_ids()).logits.abs().max() <= 1


# Loss.


def test_loss_is_ours(ours: RecurrentTransformer, model: Any) -> None:
    ids, mask = left_padded()
    labels = ids.clone()
    labels[1, 4:7] = -100
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):  # padded nowhere, left and right
        expected = ours(ids, labels=labels, **given)
        loss = model(ids, labels=labels, **given).loss  # in float32, as everywhere in transformers
        torch.testing.assert_close(loss.double(), expected.loss_sum / expected.token_count, rtol=1e-6, atol=0)
        summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100), **given).loss
        torch.testing.assert_close(summed.double(), expected.loss_sum / 100, rtol=1e-6, atol=0)


def test_gradients_are_ours_and_accumulate(ours: RecurrentTransformer, model: Any) -> None:
    ids, weights = random_ids(4), list(ours.parameters())
    loss = ours(ids, labels=ids)
    expected = torch.autograd.grad(loss.loss_sum / loss.token_count, weights)
    for part in ids.split(2):
        model(part, labels=part, num_items_in_batch=torch.tensor(44)).loss.backward()
    for parameter, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_position_ids_that_start_again_separate_documents(model: Any, grad: bool) -> None:
    ids = random_ids(1, 12)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.set_grad_enabled(grad):
        output = model(ids, position_ids=packed, labels=ids)
        parts = [model(part, labels=part) for part in ids.split([5, 7], dim=1)]
    close(output.logits, torch.cat([part.logits for part in parts], dim=1))
    torch.testing.assert_close(output.loss, (parts[0].loss * 4 + parts[1].loss * 6) / 10)


# Cache and generation.


@torch.no_grad()
def test_a_cache_continues_where_it_ended(model: Any) -> None:
    ids = random_ids()
    expected = model(ids, use_cache=False).logits
    first = model(ids[:, :5])
    second = model(ids[:, 5:11], past_key_values=first.past_key_values)
    third = model(ids[:, 11:], past_key_values=second.past_key_values, position_ids=torch.tensor([[11]]))
    close(torch.cat([first.logits, second.logits, third.logits], dim=1), expected)
    assert third.past_key_values.get_seq_length() == 12


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_passes(ours: RecurrentTransformer, model: Any) -> None:
    ids, mask = left_padded()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected, valid = ids, mask
    for _ in range(9):
        token = model(expected, attention_mask=valid, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected, valid = torch.cat([expected, token], 1), torch.cat([valid, torch.ones_like(token)], 1)
    assert torch.equal(generated, expected)
    assert torch.equal(generated, generate(ours, ids, mask, max_new_tokens=9).ids)
    assert torch.equal(generated, generate(model, ids, mask, max_new_tokens=9).ids)
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        result = model.generate(alone, max_new_tokens=9, do_sample=False)
        assert torch.equal(result[0, -9:], generated[row, -9:])


def test_sampling_and_several_sequences(model: Any) -> None:
    ids = random_ids(2, 5)
    torch.manual_seed(0)
    result = model.generate(ids, max_new_tokens=6, do_sample=True, temperature=3.0, num_return_sequences=3)
    assert result.shape == (6, 11)
    assert result.max() < 50
    assert len(result[:3].unique(dim=0)) == 3
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
    likeliest = model.generate(ids, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(likeliest, greedy.repeat_interleave(2, 0))
    seeded = generate(model, ids, max_new_tokens=6, do_sample=True, seeds=[1, 2], temperature=3.0).ids
    expected = generate(model.to_effml(), ids, max_new_tokens=6, do_sample=True, seeds=[1, 2], temperature=3.0).ids
    assert torch.equal(seeded, expected)


@torch.no_grad()
def test_beams_find_the_likeliest_of_all_continuations() -> None:
    config = replace(TINY, vocab_size=4)
    model = CausalLM.from_effml(RecurrentTransformer(config, seed=2).double()).eval()
    ids, mask = random_ids(2, 6, vocab=4), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    # With as many beams as there are prefixes, nothing is ever cut off.
    beams = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        num_beams=16,
        num_return_sequences=5,
        do_sample=False,
        pad_token_id=0,
    )
    every = torch.tensor([*itertools.product(range(4), repeat=3)])
    for row in range(2):
        prompt = ids[row, mask[row].bool()]
        full = torch.cat([prompt.expand(len(every), -1), every], dim=1)
        scores = model(full).logits[:, -4:-1].log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
        best = every[scores.topk(5).indices]
        assert torch.equal(beams[row * 5 : row * 5 + 5, -3:], best)


def test_drafts_are_verified(model: Any) -> None:
    ids = random_ids(1, 4).repeat(1, 4)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 49}  # 4.56 cannot do without one
    expected = model.generate(ids, **settings)
    drafted = model.generate(ids, **settings, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted[:, : expected.shape[1]], expected)  # 4.56 may keep one draft more than was asked for


def test_a_static_cache_is_refused_in_one_line() -> None:
    model = CausalLM(HFConfig.from_effml(TINY)).eval()
    with pytest.raises(
        ConfigError, match=r"past_key_values: got a StaticCache, expected a plain DynamicCache"
    ) as error:
        model.generate(random_ids(), max_new_tokens=2, cache_implementation="static")
    assert "\n" not in str(error.value)


# Files.


def test_saving_and_loading_is_bitwise(ours: RecurrentTransformer, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == ours.state_dict().keys()  # a tied head is not among them
    ours.load_state_dict(stored)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is CausalLM
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, stored[name])
        assert tensor.dtype == torch.float64
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


def test_a_file_of_ours_is_read(ours: RecurrentTransformer, model: Any, tmp_path: Path) -> None:
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.generate(random_ids(), max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_what_a_file_lacks_is_drawn_as_in_a_new_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = CausalLM(HFConfig.from_effml(TINY))
    model.save_pretrained(tmp_path)
    stored = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    lacking = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    rest = {name: tensor + 1 for name, tensor in stored.items() if name not in lacking}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor if name in lacking else rest[name])


def test_the_write_mix_of_the_layers_is_saved(tmp_path: Path) -> None:
    ours = RecurrentTransformer(replace(TINY, write_mix=0.0))
    set_write_mix(ours, 0.25)
    model = CausalLM.from_effml(ours)
    assert model.config.write_mix == 0.25
    set_write_mix(model, 0.75)
    model.save_pretrained(tmp_path)
    assert {layer.write_mix for layer in CausalLM.from_pretrained(tmp_path).model["layers"]} == {0.75}
    model.model["layers"][0].write_mix = 0.5
    with pytest.raises(ConfigError, match=r"write_mix: got \[0.5, 0.75\] in different layers, expected one for all"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tied: bool, tmp_path: Path) -> None:
    model = CausalLM(HFConfig.from_effml(replace(TINY, tied=tied))).eval()
    expected = model(random_ids()).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    assert torch.equal(model(random_ids()).logits[..., :50], expected)
    assert model(torch.tensor([[139]])).logits.shape == (1, 1, 140)
    assert 0.5 < model.get_input_embeddings().weight[128:].std() * 4 < 2  # drawn as the others were
    model.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_rows"] == 140


# Refusals.


def test_gradient_checkpointing_is_a_warning() -> None:
    model = CausalLM(HFConfig.from_effml(TINY))
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):  # until and since 5
        with pytest.warns(UserWarning, match=r"gradient checkpointing is left off"):
            getattr(model, name, model.gradient_checkpointing_enable)()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": None}, r"input_ids: got neither input_ids nor inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 12, 16)}, r"input_ids: got both"),
        ({"labels": random_ids(seq=3)}, r"labels: got shape \(2, 3\), expected \(batch, seq\)=\(2, 12\)"),
        ({"position_ids": torch.arange(12)}, r"position_ids: got shape \(12,\), expected \(2, 12\) or \(1, 12\)"),
        ({"output_attentions": True}, r"output_attentions: got True, expected False"),
        ({"labels": random_ids(), "logits_to_keep": 1}, r"logits_to_keep: got 1 with labels, expected 0"),
        ({"logits_to_keep": torch.tensor([1])}, r"logits_to_keep: got tensor\(\[1\]\), expected an integer"),
        ({"attention_mask": torch.ones(2, 11)}, r"attention_mask: got shape \(2, 11\), expected \(2, 12\)"),
        ({"attention_mask": torch.ones(2, 11), "use_cache": False}, r"attention_mask: got shape \(2, 11\)"),
        ({"use_cache": True}, r"cache: got a pass with gradients"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    model = CausalLM(HFConfig.from_effml(TINY))
    with pytest.raises(ConfigError, match=message):
        model(**{"input_ids": random_ids(), **given})


# Trainer.


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows that count upwards from their index; every third is padded on the right."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = (torch.arange(12) + index) % 50, torch.ones(12, dtype=torch.long)
        if index % 3 == 0:
            mask[8:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def make_trainer(folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        dataloader_pin_memory=False,
    )
    torch.manual_seed(0)
    model = CausalLM(HFConfig.from_effml(TINY))
    return transformers.Trainer(model, arguments, train_dataset=Counting(), eval_dataset=Counting())


def test_trains_generates_saves_loads_and_continues(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    trainer = make_trainer(tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1

    halfway = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    ids, mask = left_padded(pads=4)
    assert torch.equal(
        halfway.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0),
        generate(halfway.to_effml(), ids, mask, max_new_tokens=4).ids,
    )

    continued = make_trainer(tmp_path / "continued")
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert continued.state.global_step == 12
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    for uninterrupted, stored, resumed in zip(
        trainer.model.parameters(), last.parameters(), continued.model.parameters(), strict=True
    ):
        assert torch.equal(uninterrupted, stored)
        assert torch.equal(uninterrupted, resumed)
