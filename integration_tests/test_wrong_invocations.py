"""`effml run optim.soap` fed with wrong configurations and hostile data: one line, exit code 2, nothing left behind."""

import errno
import json
import os

import pytest
from effml_shared.cli import main

TEXT = "to be or not to be, that is the question\n" * 4000


def file(path, name, content):
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"data.corpus={path / name}"


def empty_folder(path):
    (path / "texts").mkdir()
    return f"data.corpus={path / 'texts'}"


def parquet_cut_short(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["abc"] * 1000}), path / "whole.parquet")
    return file(path, "cut.parquet", (path / "whole.parquet").read_bytes()[:-20])


WRONG_CONFIG = {
    "unknown field": "modle.d_model=64",
    "unknown leaf": "model.width=64",
    "text for a number": "model.d_model=wide",
    "negative width": "model.d_model=-64",
    "heads that do not divide": "model.n_heads=5",
    "kv heads that do not divide": "model.n_kv_heads=3",
    "unknown norm": "model.norm=batch",
    "unknown MLP": "model.mlp=swish",
    "zero steps": "steps=0",
    "negative batch": "batch_size=-4",
    "empty grid": "learning_rates=[]",
    "negative rate": "learning_rates=[-0.1]",
    "a rate that is text": "learning_rates=[fast]",
    "a scalar for a list": "learning_rates=0.1",
    "fractions without the whole": "fractions=[0.5]",
    "fractions above one": "fractions=[0.5,2.0]",
    "warm-up of everything": "warmup=1.0",
    "unknown precision": "precision=fp8",
    "window of one token": "data.seq_len=1",
    "nothing held out": "data.held_out=0",
    "everything held out": "data.held_out=1",
    "three betas": "betas=[0.9,0.95,0.99]",
    "zero seeds": "seeds=0",
    "micro-batch of none": "micro_batch=0",
    "no clipping by zero": "clip_norm=0",
}
WRONG_DATA = {
    "missing file": lambda p: f"data.corpus={p / 'none.txt'}",
    "missing folder": lambda p: f"data.corpus={p / 'none'}/",
    "empty folder": empty_folder,
    "nothing but its own run directory": lambda p: f"data.corpus={p}",
    "glob without match": lambda p: f"data.corpus={p}/*.txt",
    "empty file": lambda p: file(p, "a.txt", ""),
    "too little text": lambda p: file(p, "a.txt", "hi"),
    "not UTF-8": lambda p: file(p, "a.txt", b"abc\xff\xfe" * 100),
    "malformed JSONL": lambda p: file(p, "a.jsonl", '{"text": "a"}\n{"text": \n'),
    "JSONL without the field": lambda p: file(p, "a.jsonl", '{"body": "a"}\n'),
    "JSONL with a number": lambda p: file(p, "a.jsonl", '{"text": 3}\n'),
    "truncated Parquet": parquet_cut_short,
    "truncated gzip": lambda p: file(p, "a.txt.gz", b"\x1f\x8b\x08\x00broken"),
    "no such tokenizer": lambda p: f"data.tokenizer={p / 'tokenizer.json'}",
    "a folder as tokenizer": lambda p: f"data.tokenizer={p}",
    "damaged tokenizer": lambda p: file(p, "t.json", '{"version": ').replace("corpus", "tokenizer"),
}


def run(path, word):
    return main(["run", "optim.soap", "--preset", "smoke", "--out", str(path / "run"), word])


def assert_one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("effml: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("case", WRONG_CONFIG)
def test_a_wrong_configuration(case, tmp_path, capsys):
    assert run(tmp_path, WRONG_CONFIG[case]) == 2
    assert_one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data(case, tmp_path, capsys):
    assert run(tmp_path, WRONG_DATA[case](tmp_path)) == 2
    assert_one_line(capsys)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_hub_name_without_network_names_the_local_alternatives(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert run(tmp_path, "data.corpus=hub:someone/something") == 2
    assert "stdlib" in assert_one_line(capsys)


def test_a_disk_that_fills_up_is_one_line_and_the_run_resumes(tmp_path, capsys, monkeypatch):
    real, calls = os.fsync, []

    def fills_up(descriptor):
        calls.append(descriptor)
        if len(calls) > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        assert run(tmp_path, "seeds=1") == 2
    assert "No space left on device" in assert_one_line(capsys)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "report:" in capsys.readouterr().out
