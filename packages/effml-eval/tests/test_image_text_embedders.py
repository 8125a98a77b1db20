from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from effml_eval.activations.embedding_shards import save_embeddings
from effml_eval.activations.image_text_embedders import image_text_embedders
from effml_shared.errors import ConfigError
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {
    **SIZES,
    "vocab_size": 40,
    "max_position_embeddings": 7,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 39,
}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
PIXELS = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 39, (5, 7), generator=torch.Generator().manual_seed(1))
IDS[:, -1] = 39


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
        return transformers.CLIPModel(config)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def test_are_those_of_the_model(model: Any) -> None:
    embed = image_text_embedders(model.train())
    image, text = embed["image"]({"pixel_values": PIXELS}), embed["text"]({"input_ids": IDS})
    assert model.training
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, pixel_values=PIXELS)
    torch.testing.assert_close(image, expected.image_embeds)
    torch.testing.assert_close(text, expected.text_embeds)
    assert not image.requires_grad
    torch.testing.assert_close(text.norm(dim=1), torch.ones(5))


def test_are_stored_as_pairs(model: Any, tmp_path: Path) -> None:
    embed = image_text_embedders(model)
    batches: list[tuple[str, Any, Tensor | None]] = [
        ("image", {"pixel_values": PIXELS[:3]}, None),
        ("text", {"input_ids": IDS}, torch.tensor([0, 1, 2, 3, 4])),
        ("image", {"pixel_values": PIXELS[3:]}, None),
        ("text", {"input_ids": IDS.flip(0)}, torch.tensor([4, 3, 2, 1, 0])),
    ]
    shards = save_embeddings(embed, batches, tmp_path)
    assert shards.sizes == {"image": 5, "text": 10}
    ((image, text),) = shards.pairs("image", "text")
    torch.testing.assert_close(image[:5], embed["image"]({"pixel_values": PIXELS}))
    assert torch.equal(image[:5], image[5:].flip(0))
    torch.testing.assert_close(text[:5], text[5:].flip(0))
    torch.testing.assert_close(shards.take("text", np.arange(5)), embed["text"]({"input_ids": IDS}))


def test_takes_models_that_return_tensors() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def get_image_features(self, x: Tensor) -> Tensor:
            return x * self.weight

        get_text_features = get_image_features

    x = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    found = image_text_embedders(Plain())["text"]({"x": x})
    torch.testing.assert_close(found, F.normalize(x.float()))


def test_refuses_other_models() -> None:
    with pytest.raises(
        ConfigError, match=r"model: got a Linear without get_image_features, expected one like CLIPModel"
    ):
        image_text_embedders(nn.Linear(2, 2))
