"""C files are built once, in a place of the user's own, and never stand in the way."""

import ctypes
import logging
import shutil

import pytest
from effml_shared import native

SOURCE = "double twice(double x, double y) { return SCALE * x + y; }\n"
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def nothing_built(monkeypatch, tmp_path):
    caches = (native.library, native._compiler, native._cache_directory)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "twice.c"
    path.write_text(SOURCE)
    return path


def call(built, x, y):
    built.twice.restype, built.twice.argtypes = ctypes.c_double, (ctypes.c_double, ctypes.c_double)
    return built.twice(x, y)


@needs_compiler
def test_a_file_is_built_once_per_machine_and_macros(source, tmp_path):
    assert call(native.library(source, ("SCALE=2",)), 3.0, 0.5) == 6.5
    assert native.library(source, ("SCALE=2",)) is native.library(source, ("SCALE=2",))
    (first,) = (tmp_path / "effml").iterdir()
    stamp = first.stat().st_mtime_ns
    native.library.cache_clear()
    assert call(native.library(source, ("SCALE=2",)), 3.0, 0.5) == 6.5
    assert first.stat().st_mtime_ns == stamp  # found, not built again
    assert call(native.library(source, ("SCALE=3",)), 3.0, 0.5) == 9.5
    source.write_text(SOURCE.replace("+", "-"))
    native.library.cache_clear()
    assert call(native.library(source, ("SCALE=2",)), 3.0, 0.5) == 5.5
    assert len(list((tmp_path / "effml").iterdir())) == 3


@needs_compiler
def test_sums_of_products_are_rounded_twice_unless_asked_for(source):
    x = 1 + 2.0**-30
    defines = ("SCALE=x",)  # x x - (1 + 2^-29) is 2^-60, which the rounding of x x loses
    assert call(native.library(source, defines), x, -(1 + 2.0**-29)) == 0.0
    assert call(native.library(source, defines, fused=True), x, -(1 + 2.0**-29)) in (0.0, 2.0**-60)


def test_without_a_compiler_the_log_says_so_once(source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        assert native.library(source, ("SCALE=1",)) is None
        assert native.library(source, ("SCALE=2",)) is None
    message = "no C compiler found (cc, gcc, clang), so plain versions serve on the CPU, several times slower"
    assert [record.message for record in caplog.records] == [message]


def test_a_compiler_that_fails_is_no_error(source, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert native.library(source, ()) is None
    assert "twice.c could not be built, so the plain version serves: no such luck" in caplog.text
    assert list((tmp_path / "effml").iterdir()) == []


@needs_compiler
def test_a_file_that_is_missing_or_wrong_is_no_error(source, tmp_path, caplog):
    assert native.library(tmp_path / "nowhere.c") is None
    source.write_text("this is no C")
    assert native.library(source) is None
    assert caplog.text.count("could not be built") == 2


@needs_compiler
def test_libraries_are_not_loaded_from_a_directory_that_others_can_write(source, tmp_path):
    cache = tmp_path / "effml"
    cache.mkdir()
    cache.chmod(0o777)
    assert call(native.library(source, ("SCALE=2",)), 1.0, 0.0) == 2.0
    assert native._cache_directory() != cache
    assert list(cache.iterdir()) == []
