import torch
from effml_quant.precision.hadamard import hadamard_rotate


def test_the_rotation_is_orthogonal_and_its_entries_are_a_quarter():
    rotation = hadamard_rotate(torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=0)
    assert set(rotation.abs().flatten().tolist()) == {0.25}
    assert (rotation.sum(0).abs() < 4).any()  # the signs are not all one, or H's first row would sum to 4


def test_products_over_tokens_do_not_change():
    stream = torch.Generator().manual_seed(0)
    for shape in ((40, 3), (16, 3), (1, 3), (0, 3), (2, 19, 3)):
        g, x = torch.randn(2, *shape, generator=stream, dtype=torch.float64)
        rotated = hadamard_rotate(g).mT @ hadamard_rotate(x)
        torch.testing.assert_close(rotated, g.mT @ x, rtol=1e-12, atol=1e-12)
        assert hadamard_rotate(x).shape[-2] % 16 == 0


def test_an_outlier_is_spread_over_its_group():
    x = torch.zeros(32, 2)
    x[5, 1] = 16.0
    rotated = hadamard_rotate(x)
    assert rotated[:16, 1].abs().tolist() == [4.0] * 16
    assert rotated[:, 0].count_nonzero() == rotated[16:].count_nonzero() == 0
