from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_eval.concepts.bridge import BridgeAccumulator, bridge_edges, bridge_matrix
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("dense", "sparse")
ATOMS = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64)
IMAGE = torch.tensor([[1, 0, 2], [0, 1, 0]], dtype=torch.float64)
TEXT = torch.tensor([[0, 1, 1], [2, 0, 0]], dtype=torch.float64)


def _dense(matrix: Tensor) -> Tensor:
    return matrix.to_dense() if matrix.is_sparse else matrix


def _random(rows: int = 30, n: int = 9, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    image, text = ((torch.randn(rows, n, generator=g, dtype=torch.float64) - 0.8).clamp(min=0) for _ in range(2))
    image[:, 3] = 0
    return image, text, torch.randn(n, dim, generator=g, dtype=torch.float64) * 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [lambda z: z, SparseCodes.from_dense])
def test_three_concepts_by_hand(layout: str, form: Any) -> None:
    meter = BridgeAccumulator(ATOMS, layout=layout)
    meter.update(form(IMAGE), form(TEXT))
    gamma = torch.tensor([[0, 0.5, 0.5], [1, 0, 0], [0, 1, 1]], dtype=torch.float64)
    expected = torch.tensor([[0, 0, 0.3], [0, 0, 0], [0, 0.8, 1]], dtype=torch.float64)
    torch.testing.assert_close(_dense(meter.coactivation()), gamma)
    torch.testing.assert_close(_dense(meter.matrix()), expected)
    assert float(_dense(meter.matrix()).sum()) == pytest.approx(2.1)
    assert meter.pair_similarity == pytest.approx(2.1)
    image, text, score = meter.edges(10)
    assert list(zip(image.tolist(), text.tolist(), strict=True)) == [(2, 2), (2, 1), (0, 2)]
    assert score.tolist() == pytest.approx([1, 0.8, 0.3])
    swapped = bridge_matrix(form(TEXT), form(IMAGE), ATOMS, layout=layout)
    torch.testing.assert_close(_dense(swapped), expected.T)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from(LAYOUTS))
def test_bridges_add_up_to_the_pair_similarity_however_rows_are_cut(seed: int, sizes: list[int], layout: str) -> None:
    sizes = [*sizes, 1]
    image, text, atoms = _random(sum(sizes), seed=seed)
    meter = BridgeAccumulator(atoms, layout=layout)
    for turn, (a, b) in enumerate(zip(image.split(sizes), text.split(sizes), strict=True)):
        meter.update(SparseCodes.from_dense(a) if turn % 2 else a, SparseCodes.from_dense(b) if turn % 3 else b)
    similarity = ((image @ atoms) * (text @ atoms)).sum(1).mean()
    found = _dense(meter.matrix())
    torch.testing.assert_close(found, image.T @ text / len(image) * (atoms @ atoms.T), rtol=1e-9, atol=1e-12)
    assert float(found.sum()) == pytest.approx(float(similarity), rel=1e-9, abs=1e-12)
    assert meter.pair_similarity == pytest.approx(float(similarity), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("block", [1, 8, 50])
def test_small_blocks_and_many_merges_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, atoms = _random()
    expected = image.T @ text / 30 * (atoms @ atoms.T)
    monkeypatch.setattr("effml_eval.concepts.bridge.BLOCK", block)
    for layout in LAYOUTS:
        for form in (lambda z: z, SparseCodes.from_dense):
            found = bridge_matrix(form(image), form(text), atoms, layout=layout)
            torch.testing.assert_close(_dense(found), expected, rtol=1e-9, atol=1e-12)


def test_float32_and_half_precision_codes_do_not_underflow() -> None:
    image, text, atoms = _random()
    expected = image.T @ text / 30
    small = torch.full((1, 1), 2.0**-14, dtype=torch.float16)  # whose square is 0 in half precision
    for layout in LAYOUTS:
        meter = BridgeAccumulator(atoms.float(), layout=layout)
        meter.update(image.float(), SparseCodes.from_dense(text.float()))
        torch.testing.assert_close(_dense(meter.coactivation()).double(), expected, rtol=1e-5, atol=1e-7)
        assert float(_dense(bridge_matrix(small, small, torch.ones(1, 1), layout=layout))) == 2.0**-28


def test_scaling_atoms_against_their_codes_changes_no_bridge() -> None:
    image, text, atoms = _random()
    scale = torch.rand(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    expected = bridge_matrix(image, text, atoms)
    torch.testing.assert_close(bridge_matrix(image / scale, text / scale, atoms * scale[:, None]), expected)
    cosine = bridge_matrix(image / scale, text / scale, atoms * scale[:, None], gram="cosine")
    assert not torch.allclose(cosine, bridge_matrix(image, text, atoms, gram="cosine"))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gram", ["raw", "cosine"])
def test_options_against_the_formulas(center: bool, normalize: bool, gram: str) -> None:
    image, text, atoms = _random()
    a, b = (z - z.mean(0) if center else z for z in (image, text))
    gamma = a.T @ b / 30
    if normalize:
        gamma = gamma / a.square().mean(0).sqrt()[:, None] / b.square().mean(0).sqrt()
        gamma = gamma.nan_to_num(0)
    rows = torch.nn.functional.normalize(atoms, dim=1) if gram == "cosine" else atoms
    expected = gamma * (rows @ rows.T)
    options: dict[str, Any] = {"gram": gram, "center": center, "normalize": normalize}
    torch.testing.assert_close(bridge_matrix(image, text, atoms, **options), expected)
    sparse = bridge_matrix(image, text, atoms, layout="sparse", **options).to_dense()
    together = image.T @ text > 0  # elsewhere a sparse layout stores nothing
    torch.testing.assert_close(sparse, torch.where(together, expected, 0.0))


def test_a_concept_that_never_varies_has_correlation_zero() -> None:
    constant = torch.full((7, 1), 0.1)
    assert bridge_matrix(constant, constant, torch.ones(1, 1), center=True, normalize=True).tolist() == [[0.0]]


def test_weights_count_pairs() -> None:
    image, text, atoms = _random(4)
    often = torch.tensor([0, 1, 1, 2, 2, 2])
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    for layout in LAYOUTS:
        for form in (lambda z: z, SparseCodes.from_dense):
            meter = BridgeAccumulator(atoms, layout=layout)
            meter.update(form(image), form(text), weights)
            plain = BridgeAccumulator(atoms, layout=layout)
            plain.update(form(image[often]), form(text[often]))
            for center in (False, True):
                one, other = (_dense(m.matrix(center=center, normalize=True)) for m in (meter, plain))
                torch.testing.assert_close(one, other)
            assert meter.pair_similarity == pytest.approx(plain.pair_similarity)


def test_the_layout_follows_the_number_of_concepts() -> None:
    assert BridgeAccumulator(torch.ones(3, 1)).layout == "dense"
    large = BridgeAccumulator(torch.ones(200_000, 1))
    assert large.layout == "sparse"
    codes = SparseCodes(torch.ones(2, 2), torch.tensor([[199_999, 5], [7, 7]]), 200_000)
    large.update(codes, codes)
    edges = large.edges(10)
    assert edges.score.tolist() == [2.0, 0.5, 0.5, 0.5, 0.5]
    assert edges.image.tolist() == [7, 5, 5, 199_999, 199_999]
    assert edges.text.tolist() == [7, 5, 199_999, 5, 199_999]


def test_edges_are_positive_and_in_one_order() -> None:
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, -3.0, 2.0]])
    for form in (matrix, matrix.to_sparse()):
        found = bridge_edges(form, 3)
        assert [column.tolist() for column in found] == [[1, 0, 0], [2, 0, 1], [2.0, 1.0, 1.0]]
        assert len(bridge_edges(form, 100).score) == 4
    assert len(bridge_edges(torch.zeros(3, 3), 2).score) == 0
    assert len(bridge_edges(torch.zeros(0, 0), 2).score) == 0


def test_errors() -> None:
    meter = BridgeAccumulator(ATOMS)
    assert math.isnan(meter.pair_similarity)
    with pytest.raises(ConfigError, match=r"^bridge: got no pairs"):
        meter.matrix()
    with pytest.raises(ConfigError, match=r"^text_codes: got 1 rows beside 2 image codes, expected one per pair$"):
        meter.update(IMAGE, TEXT[:1])
    with pytest.raises(ConfigError, match=r"^image_codes: got shape \(2, 2\), expected \(rows, 3\)$"):
        meter.update(IMAGE[:, :2], TEXT[:, :2])
    with pytest.raises(ConfigError, match=r"^text_codes: got shape \(2,\), expected \(rows, 3\)$"):
        meter.update(IMAGE, TEXT[:, 0])
    with pytest.raises(ConfigError, match=r"^image_codes: got 6 of 6 numbers NaN or infinite"):
        meter.update(IMAGE * torch.nan, TEXT)
    with pytest.raises(ConfigError, match=r"^weights: got shape \(3,\), expected \(2,\)"):
        meter.update(IMAGE, TEXT, torch.ones(3))
    with pytest.raises(ConfigError, match=r"^weights: .* numbers >= 0$"):
        meter.update(IMAGE, TEXT, torch.tensor([1.0, -1.0]))
    assert meter.rows == 0
    with pytest.raises(ConfigError, match=r"^layout: got 'hashed'"):
        BridgeAccumulator(ATOMS, layout="hashed")
    with pytest.raises(ConfigError, match=r"^gram: got 'dot'"):
        bridge_matrix(IMAGE, TEXT, ATOMS, gram="dot")
    with pytest.raises(ConfigError, match=r"^top: got 0"):
        bridge_edges(torch.ones(2, 2), 0)
    with pytest.raises(ConfigError, match=r"^matrix: got torch.float32 of shape \(2,\)"):
        bridge_edges(torch.ones(2), 1)
