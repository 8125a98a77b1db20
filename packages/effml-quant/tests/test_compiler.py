"""Kernels are built once, in a place of the user's own, and never stand in the way."""

import logging

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.casting import plain_cast
from effml_quant.kernels import compiler, native


@pytest.fixture
def nothing_built(monkeypatch):
    for cached in (compiler.library, compiler._compiler, compiler._cache_directory):
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in (compiler.library, compiler._compiler, compiler._cache_directory):
        cached.cache_clear()


def test_without_a_compiler_the_plain_version_serves_and_says_so_once(nothing_built, caplog):
    x = torch.randn(8, 32)
    nothing_built.setenv("PATH", "")
    nothing_built.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(fake_quantize(x, "mxfp4"), plain_cast(x, Quantizer("mxfp4")))
    assert [record.message for record in caplog.records] == [
        "no C compiler found (cc, gcc, clang), so casts on the CPU take the plain path"
    ]


def test_a_compiler_that_fails_is_no_error(nothing_built, tmp_path, caplog):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    nothing_built.setenv("CC", str(broken))
    nothing_built.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = torch.randn(8, 32)
    assert torch.equal(fake_quantize(x, "mxfp4"), plain_cast(x, Quantizer("mxfp4")))
    assert "no such luck" in caplog.text
    assert list((tmp_path / "cache" / "effml-quant").iterdir()) == []


def test_libraries_are_not_loaded_from_a_directory_that_others_can_write(nothing_built, tmp_path):
    cache = tmp_path / "effml-quant"
    cache.mkdir()
    cache.chmod(0o777)
    nothing_built.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler._cache_directory() != cache
    assert native.is_available()
