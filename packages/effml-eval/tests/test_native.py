"""Which tensors the kernels take, and that what they cannot read is refused."""

import pytest
import torch
from effml_eval.sae import native
from torch.func import vmap


def test_takes_plain_float_tensors_on_the_cpu():
    assert native.serves(torch.ones(2), torch.nn.Parameter(torch.ones(3)))
    assert native.serves(torch.ones(2, dtype=torch.float64))
    assert not native.serves(torch.ones(2, dtype=torch.bfloat16))
    assert not native.serves(torch.ones(2, dtype=torch.int64))
    assert not native.serves(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not native.serves(torch.ones(2, device="meta"))
    seen = []
    vmap(lambda row: (seen.append(native.serves(row)), row)[1])(torch.ones(2, 2))
    assert seen == [False]


def test_without_a_compiler_the_plain_versions_serve(monkeypatch):
    monkeypatch.setattr(native, "library", lambda *arguments, **options: None)
    assert not native.serves(torch.ones(2))


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(RuntimeError, match=r"normalize_rows: got a tensor that is not contiguous"):
        native.run("normalize_rows", torch.float32, 2, 3, 0.0, torch.ones(3, 2).T)


def test_memory_for_kernels_is_ordinary_memory():
    large = native.empty(1 << 11, 1 << 10, dtype=torch.float32)
    assert large.shape == (2048, 1024)
    assert float(large.fill_(2.0).sum()) == 2.0 * large.numel()
    assert native.empty(0, 3, dtype=torch.bfloat16).shape == (0, 3)
