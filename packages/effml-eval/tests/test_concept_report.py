from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_eval.concepts.bridge import bridge_edges, bridge_matrix
from effml_eval.concepts.concept_report import ConceptReport, measure_concepts
from effml_eval.concepts.energy import modality_energy
from effml_eval.concepts.matching import match_dictionaries
from effml_eval.concepts.modality import modality_alignment, modality_direction, modality_score
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.tree import write_tree
from safetensors.torch import save_file
from torch import Tensor


def _data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(20, 6, generator=g).clamp(min=0) for _ in range(2))
    image[:, 2], text[:, 2], text[:, 4] = 0, 0, 0
    atoms, other = (torch.randn(n, 5, generator=g) for n in (6, 8))
    return image, text, atoms, other, torch.randn(20, 5, generator=g)


def _report(**options: Any) -> ConceptReport:
    image, text, atoms, other, x = _data()
    return measure_concepts(
        image,
        SparseCodes.from_dense(text),
        atoms,
        **{"images": x, "texts": -x + 1, "other": other, "top": 3, "bridges": 5, **options},
    )


def test_columns_are_those_of_the_metrics() -> None:
    image, text, atoms, other, x = _data()
    report = _report(text_labels=[f"caption {i}" for i in range(20)], image_labels={0: "a.png"}, about={"seed": 1})
    energy = modality_energy(image, text, atoms)
    torch.testing.assert_close(report.image_energy, energy.image)
    torch.testing.assert_close(report.energy, energy.balanced)
    torch.testing.assert_close(report.modality_score, modality_score(*energy), equal_nan=True)
    assert report.modality_score[2].isnan()
    assert report.alignment is not None
    torch.testing.assert_close(report.alignment, modality_alignment(atoms, modality_direction(x, -x + 1)))
    assert report.stability is not None
    torch.testing.assert_close(report.stability, match_dictionaries(atoms, other, rectangular=True).similarity)
    assert report.bridges is not None
    torch.testing.assert_close(report.bridges.score, bridge_edges(bridge_matrix(image, text, atoms), 5).score)
    assert report.pair_similarity == pytest.approx(float(((image @ atoms) * (text @ atoms)).sum(1).mean()), rel=1e-5)
    assert report.text_labels == {row: f"caption {row}" for row in report.top_texts.rows.unique().tolist() if row >= 0}
    assert set(report.image_labels) <= {0}
    concept = int(report.bridges.image[0])
    assert report.bridges_of(concept).score[0] == report.bridges.score[0]


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    for report in (
        _report(about={"model": "clip", "k": 8}),
        _report(paired=False, other=None, images=None, texts=None),
    ):
        report.save(tmp_path / "concepts.safetensors")
        again = ConceptReport.load(tmp_path / "concepts.safetensors")
        for field in dataclasses.fields(ConceptReport):
            one, other = getattr(report, field.name), getattr(again, field.name)
            if isinstance(one, Tensor | tuple):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            else:
                assert one == other
    assert again.bridges is again.stability is again.alignment is None


def test_unpaired_sets_of_different_sizes_have_no_bridges() -> None:
    image, text, atoms, _, _ = _data()
    report = measure_concepts(image, text[:7], atoms, paired=False)
    assert (report.image_rows, report.text_rows) == (20, 7)
    with pytest.raises(ConfigError, match=r"^concept: got 0, expected one with bridges: none were measured$"):
        report.bridges_of(0)
    with pytest.raises(ConfigError, match=r"^text_codes: got 7 rows beside 20"):
        measure_concepts(image, text[:7], atoms)


def test_an_atom_of_norm_zero_has_no_alignment() -> None:
    image, text, atoms, _, x = _data()
    atoms[1] = 0
    report = measure_concepts(image, text, atoms, images=x, texts=x + 1)
    assert report.alignment is not None
    assert report.alignment.isnan().tolist() == [False, True, False, False, False, False]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^images, texts: got one of them"):
        _report(texts=None)
    with pytest.raises(ConfigError, match=r"^image_codes: got shape \(20, 6\), expected \(rows, 5\)"):
        measure_concepts(*_data()[:2], torch.ones(5, 2))
    report = _report()
    with pytest.raises(ConfigError, match=r"^concept: got 6, expected one with bridges: concepts are 0 to 5$"):
        report.bridges_of(6)
    with pytest.raises(ConfigError, match=r"^stability: got shape \(2,\), expected \(6,\)"):
        dataclasses.replace(report, stability=torch.ones(2))
    with pytest.raises(CheckpointError, match=r"^cannot write .*/nowhere/concepts\.safetensors: "):
        report.save(tmp_path / "nowhere" / "concepts.safetensors")
    report.save(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"about\.path: got a PosixPath"):
        dataclasses.replace(report, about={"path": tmp_path}).save(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert ConceptReport.load(tmp_path / "x").n_concepts == report.n_concepts


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "concepts.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        ConceptReport.load(path)
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        ConceptReport.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"expected 'effml-tree-1'"):
        ConceptReport.load(path)
    for tree in ([1], {"a": 1}, {"concept_report": 2}):
        write_tree(path, tree)
        with pytest.raises(CheckpointError, match=r"expected a concept report of format 1"):
            ConceptReport.load(path)
    write_tree(path, {"concept_report": 1, "image_energy": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"does not fit together"):
        ConceptReport.load(path)
