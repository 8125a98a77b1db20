"""What a dictionary of concepts holds: metrics of its codes and atoms, interventions, and methods to compare with.

reconstruction   R2, FVU, the front       firing           L0, dead concepts       energy           mean codes
modality         score, axis, alignment   modality_probe   best thresholds         top_inputs       strongest rows
matching         one-to-one assignment    stability        over runs, its nulls    bridge           image-text pairs
interventions    ablate, steer, remove    pair_alignment   retrieval, the gap      bridge_null      which are chance
concept_report   the record of it all     code_entries     dense and sparse codes  baselines        PCA, k-means, ...
"""

import effml_eval.sae  # noqa: F401  # first, because training an autoencoder reads metrics of this room

# isort: split
from effml_eval.concepts.bridge import BridgeAccumulator, BridgeEdges, bridge_edges, bridge_matrix
from effml_eval.concepts.bridge_null import significant_bridges
from effml_eval.concepts.concept_report import ConceptReport, measure_concepts
from effml_eval.concepts.energy import ModalityEnergy, energy, energy_share, modality_energy, top_concepts
from effml_eval.concepts.firing import Firing, dead_fraction, l0
from effml_eval.concepts.interventions import ablate, remove_directions, steer
from effml_eval.concepts.matching import Matching, match_dictionaries
from effml_eval.concepts.modality import (
    ModalityHistogram,
    modality_alignment,
    modality_direction,
    modality_histogram,
    modality_score,
    modality_subspace,
)
from effml_eval.concepts.modality_probe import ModalityProbe, modality_probe
from effml_eval.concepts.pair_alignment import PairAlignment, modality_gap, pair_alignment, retrieval_ranks
from effml_eval.concepts.reconstruction import Reconstruction, fvu, pareto_front, r2
from effml_eval.concepts.stability import energy_stability, stability, stability_null
from effml_eval.concepts.top_inputs import TopInputs, top_inputs

__all__ = [
    "BridgeAccumulator",
    "BridgeEdges",
    "ConceptReport",
    "Firing",
    "Matching",
    "ModalityEnergy",
    "ModalityHistogram",
    "ModalityProbe",
    "PairAlignment",
    "Reconstruction",
    "TopInputs",
    "ablate",
    "bridge_edges",
    "bridge_matrix",
    "dead_fraction",
    "energy",
    "energy_share",
    "energy_stability",
    "fvu",
    "l0",
    "match_dictionaries",
    "measure_concepts",
    "modality_alignment",
    "modality_direction",
    "modality_energy",
    "modality_gap",
    "modality_histogram",
    "modality_probe",
    "modality_score",
    "modality_subspace",
    "pair_alignment",
    "pareto_front",
    "r2",
    "remove_directions",
    "retrieval_ranks",
    "significant_bridges",
    "stability",
    "stability_null",
    "steer",
    "top_concepts",
    "top_inputs",
]
