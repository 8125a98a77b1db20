"""Calling networks of every kind: the logits asked for, from a head that saw no other position."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_diffusion.denoiser import call_denoiser, call_denoiser_at, head_at, output_head, rows_at
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

IDS = torch.tensor([[0, 1, 2, 5], [3, 5, 5, 0], [4, 4, 1, 2]])
INDEX = torch.tensor([3, 5, 6])  # flat: row 0 column 3, row 1 columns 1 and 2


def transformer(**changes: Any) -> Transformer:
    config = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16, "vocab_size": 6, "causal": False, **changes}
    return Transformer(TransformerConfig(**config)).double()


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.LlamaForCausalLM(config).eval()


class TiedLLaDA(nn.Module):
    """Like LLaDA's code with tied weights: the embedding is the head, and is no module that takes hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(6, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.wte(input_ids).cumsum(1) @ self.wte.weight.T)


@pytest.mark.parametrize("make", [transformer, lambda: transformer(tied=True), bert, llama, TiedLLaDA])
def test_rows_are_those_of_all_logits(make: Any) -> None:
    model = make()
    full = call_denoiser(model, IDS)
    torch.testing.assert_close(call_denoiser_at(model, IDS, INDEX), full.flatten(0, 1)[INDEX])
    torch.testing.assert_close(call_denoiser(model, IDS), full)  # no hook is left behind


@pytest.mark.parametrize("make", [transformer, bert, llama])
def test_the_head_sees_only_these_rows(make: Any) -> None:
    model, seen = make(), []
    head = output_head(model)
    assert head is not None
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // output.shape[-1]))
    call_denoiser_at(model, IDS, INDEX)
    call_denoiser(model, IDS)
    assert seen == [len(INDEX), IDS.numel()]


def test_flops_of_the_head_shrink_to_the_share_of_rows() -> None:
    model = transformer(vocab_size=4096)
    with FlopCounterMode(display=False) as dense:
        call_denoiser(model, IDS)
    with FlopCounterMode(display=False) as sparse:
        call_denoiser_at(model, IDS, INDEX)
    head = 2 * 16 * 4096
    assert dense.get_total_flops() - sparse.get_total_flops() == head * (IDS.numel() - len(INDEX))


def test_no_rows_still_give_a_gradient_path() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    model = transformer()
    logits = call_denoiser_at(model, IDS, none)
    assert logits.shape == (0, 128)
    logits.sum().backward()
    assert model.lm_head.weight.grad.abs().max() == 0  # type: ignore[union-attr]


def test_compiled_models_are_left_alone() -> None:
    """Their hooks may be those of another call: all logits are computed."""
    whole: Any = torch.compile(transformer(), backend="eager")
    in_place = transformer()
    in_place.compile(backend="eager")
    for compiled in (whole, in_place):
        assert output_head(compiled) is None
        expected = call_denoiser(transformer(), IDS).flatten(0, 1)[INDEX]
        torch.testing.assert_close(call_denoiser_at(compiled, IDS, INDEX), expected)
    inner = transformer()
    inner.model["layers"][0].compile(backend="eager")  # type: ignore[index]
    assert output_head(inner) is inner.lm_head
    replaced: Any = transformer()
    replaced.forward = torch.compile(replaced.forward, backend="eager")
    assert output_head(replaced) is None


def test_evaluation_mode_is_left_as_it_was_found() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True, True]
    with evaluating(lambda ids: ids):
        pass


def test_only_arguments_with_a_value_are_passed() -> None:
    logits = torch.zeros(3, 4, 6)
    assert call_denoiser(lambda ids: logits, IDS, attention_mask=None, t=None) is logits
    assert call_denoiser(lambda ids, t: SimpleNamespace(logits=logits), IDS, attention_mask=None, t=1.0) is logits


@pytest.mark.parametrize("output", [(torch.zeros(3, 4, 6),), None, SimpleNamespace(logits=None)])
def test_what_is_no_logits_is_refused(output: Any) -> None:
    message = r"^model: got .* from it, expected logits or an object with \.logits$"
    with pytest.raises(ConfigError, match=message):
        call_denoiser(lambda ids: output, IDS)
    with pytest.raises(ConfigError, match=message):
        call_denoiser_at(lambda ids: output, IDS, INDEX)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model: got logits of shape \(3, 5, 6\), expected \(3, 4, vocab\)$"):
        call_denoiser(lambda ids: torch.zeros(3, 5, 6), IDS)

    class Flattening(Transformer):
        def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(ids).logits.flatten(0, 1)  # type: ignore[union-attr]

    model = Flattening(transformer().config)
    with pytest.raises(ConfigError, match=r"^model: got logits of shape \(3, 128\) .* expected dense=True$"):
        call_denoiser_at(model, IDS, INDEX)


def test_the_hook_lasts_as_long_as_its_context() -> None:
    model = transformer()
    full = call_denoiser(model, IDS)
    with pytest.raises(RuntimeError, match=r"^stop$"), head_at(model, IDS.shape, INDEX):
        raise RuntimeError("stop")
    assert not model.lm_head._forward_pre_hooks  # type: ignore[union-attr]
    with head_at(model, IDS.shape, INDEX) as rows:
        assert model(IDS).logits.shape == (1, 3, 128)
        logits = model(IDS).logits
    torch.testing.assert_close(rows(logits), full.flatten(0, 1)[INDEX])
    assert model(IDS).logits.shape == full.shape


def test_a_head_may_see_further_columns_at_the_right() -> None:
    class Appending(Transformer):
        extra_columns = 2

        def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(nn.functional.pad(ids, (0, 2))).logits
            assert logits is not None
            return SimpleNamespace(logits=logits[:, : ids.shape[1]] if len(logits) == len(ids) else logits)

    model = Appending(transformer().config).double()
    full, seen = call_denoiser(model, IDS), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))  # type: ignore[union-attr]
    torch.testing.assert_close(call_denoiser_at(model, IDS, INDEX), full.flatten(0, 1)[INDEX])
    assert seen == [3]


def test_rows_are_taken_without_copying_all() -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    for view, index in ((x, torch.tensor([14, 0, 0])), (x[:, :4], torch.tensor([11, 0, 0]))):
        taken = rows_at(view, index)
        assert torch.equal(taken, view.reshape(-1, 2)[index])
        (gradient,) = torch.autograd.grad(taken.sum(), x)
        assert gradient.sum(2).flatten().unique().tolist() == [0.0, 2.0, 4.0]
        assert gradient[0, 0].tolist() == [2.0, 2.0]
