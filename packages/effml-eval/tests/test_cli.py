from __future__ import annotations

import json
from pathlib import Path

import pytest
from effml_eval import cli
from effml_eval.cli import main
from effml_shared.checkpoint import Checkpoints
from effml_shared.transformer import Transformer, TransformerConfig

SHAPE = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a directory with checkpoints, as a run leaves it."""
    run = tmp_path / "run"
    network = Transformer(TransformerConfig(**SHAPE, vocab_size=258), seed=1)  # type: ignore[arg-type]
    Checkpoints(run / "checkpoints" / "trial").save(3, {"step": {"model": network.state_dict()}})
    (run / "config.yaml").write_text(json.dumps({"model": SHAPE, "data": {"tokenizer": "byte", "eos_token": None}}))
    return run / "checkpoints" / "trial"


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    rows = [{"goal": f"count to {i}", "sol1": "use fingers", "sol2": "guess", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "piqa.jsonl"


def test_from_a_model_to_a_comparison(
    model: Path, piqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "zero"), str(tmp_path / "two")
    assert main(["run", str(model), f"piqa:{piqa}", "--out", first]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].startswith("piqa  6  acc")
    assert shown.splitlines()[-1] == f"results: {tmp_path / 'zero' / 'results.json'}"
    few = ["--num-fewshot", "2", "--shots", f"piqa={piqa}", "--limit", "6", "--ci", "wilson"]
    assert main(["run", str(model), f"piqa:{piqa}", "--out", second, *few]) == 0
    assert main(["compare", first, second, "--test", "mcnemar"]) == 0
    assert f"acc: {first} minus {second}, mcnemar" in capsys.readouterr().out
    assert main(["recompute", first, "--metrics", "brier", "--out", str(tmp_path / "again")]) == 0
    assert main(["show", str(tmp_path / "again"), "--task", "piqa", "--samples", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "brier" in lines[-3]
    assert [json.loads(line)["doc_id"] for line in lines[-2:]] == ["0", "1"]
    assert main(["show", first, "--harness"]) == 0
    assert "acc,none" in json.loads(capsys.readouterr().out)["results"]["piqa"]


def test_samples_of_generated_answers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    command = ["run", str(model), f"gsm8k:{tmp_path / 'gsm8k.jsonl'}", "--out", str(tmp_path / "out")]
    assert main([*command, "--n-samples", "3", "--temperature", "1", "--max-new-tokens", "4"]) == 0
    assert "length stopped" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["sampling"]["temperature"] == 1
    assert record["sampling"]["max_new_tokens"] == 4


def test_errors_are_one_line(model: Path, piqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([], "the following arguments are required: COMMAND"),
        (["run", str(model)], "the following arguments are required"),
        (["run", str(tmp_path / "none"), f"piqa:{piqa}", *out], "got a directory without a model"),
        (["run", str(model), "pica:x", *out], "task: got 'pica'"),
        (["run", str(model), "piqa:none.jsonl", *out], "none.jsonl: got No such file or directory"),
        (["run", str(model), f"piqa:{piqa}", *out, "--shots", "arc=x"], "--shots: got 'arc=x'"),
        (["run", str(model), f"piqa:{piqa}", *out, "--device", "abacus"], "--device: got 'abacus'"),
        (["run", str(model), f"piqa:{piqa}", *out, "--limit", "x"], "argument --limit: invalid int value: 'x'"),
        (["run", str(model), f"piqa:{piqa}", *out, "--tokenizer", "none"], "tokenizer 'none'"),
        (["run", str(model), f"piqa:{piqa}", "--out", str(piqa)], "out_dir"),
        (["show", str(tmp_path)], "got no results"),
        (["compare", str(tmp_path), str(tmp_path)], "got no results"),
        (["recompute", str(tmp_path), "--metrics", "acc"], "got no results"),
    ):
        assert main(arguments) == 2, arguments
        shown = capsys.readouterr()
        assert message in shown.err
        assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_show", stop)
    assert main(["show", "x"]) == 130
    assert capsys.readouterr().err == "effml-eval: stopped; the same command goes on\n"
