from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effml_diffusion.flex import Flex, FlexMDM
from effml_diffusion.low_rank import LowRankConfig
from effml_diffusion.retrofit import FlexWrapper
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MASK, PAD, VOCAB = 6, 7, 8
LORA = LowRankConfig(rank=2, dropout=0.0)
IDS, LENGTHS = torch.tensor([[0, 1, MASK, 2], [3, PAD, PAD, PAD], [PAD] * 4]), torch.tensor([4, 1, 0])
COND = torch.tensor([0.2, 0.5, 0.9])


def bert() -> Any:
    """Norms after the branches, absolute positions, a head with a transform and tied weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def shared() -> Transformer:
    config = TransformerConfig(
        n_layers=3, d_model=16, n_heads=2, d_ff=16, vocab_size=VOCAB, vocab_rows=VOCAB, causal=False, qk_norm="full"
    )
    return Transformer(config)


@dataclass
class LLaDAOutput:
    logits: Tensor


class LLaDABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out, self.ff_proj, self.ff_out = (
            nn.Linear(16, 16) for _ in range(6)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        y = self.attn_norm(x)
        q, k, v = (projection(y)[:, None] for projection in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.attn_out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())[:, 0])
        return x + self.ff_out(self.ff_proj(self.ff_norm(x)).relu()), None


class LLaDA(nn.Module):
    """In the manner of LLaDA's code: its names, a head called like a layer, blocks that return tuples."""

    def __init__(self, checkpointing: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList(LLaDABlock() for _ in range(3))
        parts = {
            "wte": nn.Embedding(VOCAB, 16),
            "blocks": blocks,
            "ln_f": nn.RMSNorm(16),
            "ff_out": nn.Linear(16, VOCAB),
        }
        self.transformer = nn.ModuleDict(parts)
        self.config = SimpleNamespace(d_model=16)
        self.checkpointing = checkpointing

    def get_output_embeddings(self) -> Any:
        return self.transformer["ff_out"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> LLaDAOutput:
        x = self.transformer["wte"](input_ids)
        for block in self.transformer["blocks"]:  # type: ignore[attr-defined]
            x = (self.checkpointing(block, x, attention_mask) if self.checkpointing else block(x, attention_mask))[0]
        return LLaDAOutput(self.transformer["ff_out"](self.transformer["ln_f"](x)))


BACKBONES = {"bert": bert, "shared": shared, "llada": LLaDA}


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Any:
    return BACKBONES[request.param]()


def wrap(backbone: Any, **options: Any) -> FlexWrapper:
    torch.manual_seed(1)
    return FlexWrapper(backbone, 8, PAD, **{"cond_dim": 12, "group_size": 2, "low_rank": LORA, **options})


def moved(wrapper: FlexWrapper) -> FlexWrapper:
    """The wrapper with every new parameter off its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapper


def slotted() -> tuple[Tensor, Tensor]:
    """What a wrapper gives its backbone for `IDS`."""
    column = torch.arange(5)
    ids = F.pad(IDS, (0, 1), value=PAD).where(column < LENGTHS[:, None], PAD)
    return ids, (column <= LENGTHS[:, None]).long()


def test_starts_as_the_model_itself_with_a_slot(backbone: Any) -> None:
    ids, seen = slotted()
    expected = backbone(ids, attention_mask=seen).logits[:, :4]
    out = wrap(backbone)(IDS, LENGTHS, COND)
    assert torch.equal(out.logits, expected)
    torch.testing.assert_close(out.gaps, torch.ones(3, 5))


def test_the_model_beside_and_after_is_bitwise_as_before(backbone: Any) -> None:
    ids, seen = slotted()
    before, names = backbone(ids, attention_mask=seen).logits, list(backbone.state_dict())
    wrapper = moved(wrap(backbone))
    assert (wrapper(IDS, LENGTHS, COND).logits - before[:, :4]).abs().max() > 0.01
    assert torch.equal(backbone(ids, attention_mask=seen).logits, before)
    assert any(module._forward_hooks for module in backbone.modules())
    assert wrapper.remove_hooks() is backbone
    assert torch.equal(backbone(ids, attention_mask=seen).logits, before)
    assert not any(module._forward_hooks for module in backbone.modules())
    assert list(backbone.state_dict()) == names
    with pytest.raises(ConfigError, match=r"^backbone: got one whose hooks have been removed"):
        wrapper(IDS, LENGTHS, COND)


def test_every_norm_is_modulated_by_its_group_and_layers_are_adapted() -> None:
    """Against the toy's mathematics written out."""
    wrapper = moved(wrap(LLaDA()).double())
    p = dict(wrapper.named_parameters())
    ids, seen = slotted()
    c = F.silu(wrapper.time_embedding(COND.double()))
    x = p["backbone.transformer.wte.weight"][ids]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ p[f"backbone.{name}.weight"].T + p[f"backbone.{name}.bias"]
        key = "adapters." + name.replace(".", "/")
        return y + x @ p[f"{key}.down.weight"].T @ p[f"{key}.up.weight"].T if f"{key}.up.weight" in p else y

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (16,), p[f"backbone.{name}.weight"])

    adapted = []
    for i in range(3):
        at, group = f"transformer.blocks.{i}", f"projections.{i // 2}"
        told = c @ p[f"{group}.weight"].T + p[f"{group}.bias"]
        shift_1, scale_1, shift_2, scale_2 = (part[:, None] for part in told.split(16, -1))
        y = norm(x, f"{at}.attn_norm") * (1 + scale_1) + shift_1
        q, k, v = (linear(y, f"{at}.{name}_proj")[:, None] for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, seen[:, None, None].bool())[:, 0]
        x = x + linear(mixed, f"{at}.attn_out")
        y = norm(x, f"{at}.ff_norm") * (1 + scale_2) + shift_2
        x = x + linear(linear(y, f"{at}.ff_proj").relu(), f"{at}.ff_out")
        adapted += [f"transformer/blocks/{i}/{name}_proj" for name in "qkv"]
    expected = linear(norm(x, "transformer.ln_f"), "transformer.ff_out")
    out = wrapper(IDS, LENGTHS, COND.double())
    torch.testing.assert_close(out.logits, expected[:, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.gaps, wrapper.gap_head(x, c).gaps, rtol=0, atol=1e-12)
    assert list(wrapper.adapters) == [*adapted, "transformer/ff_out"]


def test_norms_are_those_of_hidden_states(backbone: Any) -> None:
    wrapper = wrap(backbone, low_rank=None)
    assert [project.out_features for project in wrapper.projections] == [2 * 16 * 2] * 2  # two norms, two groups
    hooked = {name for name, module in backbone.named_modules() if module._forward_hooks}
    assert len(hooked) == 3 * 2 + 1  # and the last block, where the hidden states are read
    assert not any(name.rpartition(".")[2] in ("q_norm", "k_norm") for name in hooked)


def test_blocks_may_lack_a_norm_that_others_have() -> None:
    """As the first one of ModernBERT: the shifts of the others' norms do not move up to its place."""
    llada: Any = LLaDA()
    llada.transformer["blocks"][0].attn_norm = nn.Identity()
    wrapper = wrap(llada, low_rank=None)
    assert [projection.out_features for projection in wrapper.projections] == [2 * 16 * 2] * 2
    places = {
        name: hook.args[1]
        for name, module in llada.named_modules()
        for hook in module._forward_hooks.values()
        if name.endswith("_norm")
    }
    assert places == {
        f"transformer.blocks.{name}": place
        for name, place in {"0.ff_norm": 0, "1.attn_norm": 2, "1.ff_norm": 0, "2.attn_norm": 2, "2.ff_norm": 0}.items()
    }


def test_padding_and_the_batch_change_nothing(backbone: Any) -> None:
    wrapper = moved(wrap(backbone)).double()
    whole = wrapper(IDS, LENGTHS, COND.double())
    for row, k in enumerate(LENGTHS.tolist()):
        alone = wrapper(IDS[row : row + 1, :k], LENGTHS[row : row + 1], COND[row : row + 1].double())
        torch.testing.assert_close(whole.logits[row, :k], alone.logits[0], rtol=0, atol=1e-6)  # BERT has float32 parts
        torch.testing.assert_close(whole.gaps[row, : k + 1], alone.gaps[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["expectation", "distribution"])
def test_learns_with_a_frozen_backbone(kind: str, backbone: Any) -> None:
    """Texts 0 1 2 and 3 4 5 4 5 by the new parameters alone."""
    backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    wrapper = wrap(backbone, gap_head=kind, low_rank=LowRankConfig(rank=8, dropout=0.0))
    flex = FlexMDM(wrapper, MASK, PAD, max_length=8, reduction="batch")
    optimizer = torch.optim.Adam(wrapper.trainable_parameter_groups(2e-2))
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = flex.loss([[0, 1, 2], [3, 4, 5, 4, 5]] * 8).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8])
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)  # what DDP needs
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    out = Flex(8)(flex, 4, generator=torch.Generator().manual_seed(0))
    assert out.lengths.max() <= 8


def test_state_is_what_is_new_or_trained(backbone: Any) -> None:
    backbone.requires_grad_(False)
    wrapper = moved(wrap(backbone))
    state = wrapper.state_dict()
    assert set(state) == {name for name, p in wrapper.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.") for name in state)
    other = wrap(copy.deepcopy(wrapper).remove_hooks())
    other.load_state_dict(load(save(state)))
    assert torch.equal(other(IDS, LENGTHS, COND).logits, wrapper(IDS, LENGTHS, COND).logits)
    nn.ModuleDict({"network": other}).load_state_dict({f"network.{name}": value for name, value in state.items()})
    state.pop("gap_head.output.bias")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"gap_head\.output\.bias\"\. $"):
        other.load_state_dict(state)


def test_trained_parts_of_the_backbone_are_state_too() -> None:
    llada = LLaDA().requires_grad_(False)
    llada.get_output_embeddings().requires_grad_(True)
    wrapper = wrap(llada)
    head = {"backbone.transformer.ff_out.weight", "backbone.transformer.ff_out.bias"}
    assert {name for name in wrapper.state_dict() if name.startswith("backbone.")} == head
    state = wrapper.state_dict()
    state.pop("backbone.transformer.ff_out.bias")
    with pytest.raises(RuntimeError, match=r"Missing key"):
        wrapper.load_state_dict(state)


def test_groups_hold_every_trained_parameter_once() -> None:
    llada = LLaDA().requires_grad_(False)
    wrapper = wrap(llada)
    adapters, others = wrapper.trainable_parameter_groups(1e-4)
    assert (adapters["lr"], adapters["weight_decay"], others["lr"], others["weight_decay"]) == (1e-4, 0.0, 1e-4, 0.01)
    llada.get_output_embeddings().requires_grad_(True)
    adapters, head, others = wrapper.trainable_parameter_groups(1e-4, weight_decay=0.1)
    assert head["lr"] == 0.25e-4
    assert {id(p) for p in head["params"]} == {id(p) for p in llada.get_output_embeddings().parameters()}
    llada.requires_grad_(True)
    grouped = [id(p) for group in wrapper.trainable_parameter_groups(1e-4) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in wrapper.parameters())
    torch.optim.AdamW(wrapper.trainable_parameter_groups(1e-4))


def test_a_copy_is_independent(backbone: Any) -> None:
    wrapper = moved(wrap(backbone))
    expected = wrapper(IDS, LENGTHS, COND)
    other = copy.deepcopy(wrapper)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(IDS, LENGTHS, COND), expected, rtol=0, atol=0)


def gradients(wrapper: FlexWrapper) -> dict[str, Tensor]:
    first, second = (wrapper(IDS, LENGTHS, cond) for cond in (COND, 1 - COND))  # two, so that states could be mixed up
    loss = sum(out.logits.square().sum() + out.gaps.sum() for out in (first, second))
    loss.backward()
    return {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}


def test_recomputed_blocks_know_the_time() -> None:
    expected = gradients(moved(wrap(LLaDA())))
    wrapper = moved(wrap(LLaDA()))

    def recompute(block: nn.Module, *args: Tensor) -> Any:
        return checkpoint(block, *args, use_reentrant=False, context_fn=wrapper.checkpoint_contexts)

    backbone: Any = wrapper.backbone
    backbone.checkpointing = recompute
    torch.testing.assert_close(gradients(wrapper), expected)
    for reentrant in (False, True):
        backbone.checkpointing = lambda *args, how=reentrant: checkpoint(*args, use_reentrant=how)
        with pytest.raises(ConfigError, match=r"expected context_fn=wrapper\.checkpoint_contexts$"):
            gradients(wrapper)


def test_transformers_recomputes_with_the_same_gradients() -> None:
    expected = gradients(moved(wrap(bert())))
    wrapper = moved(wrap(bert()))
    model: Any = wrapper.backbone
    options = {"use_reentrant": False, "context_fn": wrapper.checkpoint_contexts}
    name = next(n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model, n))
    getattr(model, name)(options)
    torch.testing.assert_close(gradients(wrapper), expected)


def test_works_in_bfloat16_and_under_autocast(backbone: Any) -> None:
    wrapper = moved(wrap(backbone))
    expected = wrapper(IDS, LENGTHS, COND)
    seen: list[tuple[str, torch.dtype]] = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wrapper(IDS, LENGTHS, COND)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}  # adapters leave the types as they are
    backbone.bfloat16()
    narrow = wrapper(IDS, LENGTHS, COND)
    assert narrow.logits.dtype == torch.bfloat16
    assert mixed.gaps.dtype == narrow.gaps.dtype == torch.float32
    for out in (mixed, narrow):
        torch.testing.assert_close(out.logits.float(), expected.logits, atol=0.1, rtol=0.1)
        torch.testing.assert_close(out.gaps, expected.gaps, atol=0.1, rtol=0.1)


def test_compiles_in_one_graph() -> None:
    wrapper = moved(wrap(LLaDA()))
    compiled: Any = torch.compile(wrapper, backend="eager", fullgraph=True)
    for cond in (COND, 1 - COND):
        torch.testing.assert_close(compiled(IDS, LENGTHS, cond).logits, wrapper(IDS, LENGTHS, cond).logits)


def test_an_error_inside_leaves_the_hooks_idle() -> None:
    llada = LLaDA()
    wrapper = moved(wrap(llada))
    ids, seen = slotted()
    before = llada(ids, attention_mask=seen).logits
    with pytest.raises(IndexError):
        wrapper(IDS.clamp(min=99), LENGTHS, COND)
    assert torch.equal(llada(ids, attention_mask=seen).logits, before)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nn.Module, {}, r"^d_model: got None, expected the width of a backbone whose config does not say it$"),
        (nn.Module, {"d_model": 8}, r"^blocks: got None, expected the blocks of Module, which has no list of them$"),
        (LLaDA, {"group_size": 0}, r"^group_size: got 0, "),
        (LLaDA, {"cond_dim": 0}, r"^cond_dim: got 0, "),
        (LLaDA, {"pad_id": -1}, r"^pad_id: got -1, "),
        (LLaDA, {"max_length": 0}, r"^max_length: got 0, "),
        (LLaDA, {"gap_head": "no"}, r"^kind: got 'no', "),
        (LLaDA, {"low_rank": LowRankConfig(targets="no")}, r"^targets: got 'no', expected to match one of "),
    ],
)
def test_bad_arguments_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlexWrapper(make(), **{"max_length": 8, "pad_id": PAD, **options})


@pytest.mark.parametrize(
    ("lengths", "cond", "message"),
    [
        (torch.tensor([4, 1]), COND, r"^lengths: got shape \(2,\), expected \(3,\)$"),
        (LENGTHS, torch.tensor(0.5), r"^cond: got shape \(\), expected \(3,\)$"),
        (LENGTHS + 1, COND, r"^lengths: got 5, expected 0 to 4$"),
    ],
)
def test_bad_inputs_are_named(lengths: Tensor, cond: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(LLaDA())(IDS, lengths, cond)


def test_foreign_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^blocks: got a last one that was not called, expected the backbone's$"):
        wrap(LLaDA(), blocks=nn.ModuleList([LLaDABlock()]))(IDS, LENGTHS, COND)

    class PackedNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten(0, 1)

    llada = LLaDA()
    llada.transformer["blocks"][0].attn_norm = PackedNorm(16)  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"^backbone: got a norm's output of shape \(15, 16\), expected \(3, seq, "):
        wrap(llada)(IDS, LENGTHS, COND)
