import random

import numpy as np
import torch
from effml_shared import seeding
from effml_shared.tree import read_tree, write_tree


def draws():
    return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()


def test_captured_state_survives_a_file_and_repeats_every_generator(tmp_path):
    seeding.seed_all(3)
    draws()
    np.random.standard_normal()  # leaves half of a pair cached in NumPy
    write_tree(tmp_path / "state", seeding.capture())
    first = draws()
    draws()
    seeding.restore(read_tree(tmp_path / "state"))
    assert draws() == first


def test_named_streams_are_fixed_and_independent():
    assert seeding.derive_seed(0, "data") == 3547684127435271545  # sha256: the same on every machine and version
    a, b = (torch.randn(1000, generator=seeding.generator(0, "a", i)) for i in range(2))
    assert torch.equal(a, torch.randn(1000, generator=seeding.generator(0, "a", 0)))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.12
    assert seeding.derive_seed(0, "ab", "c") != seeding.derive_seed(0, "a", "bc")
    assert all(0 <= seeding.derive_seed(s, "x") < 2**63 for s in range(100))


def test_seeding_by_name_leaves_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(2, generator=seeding.generator(5, "x"))
    assert torch.equal(before, torch.get_rng_state())
