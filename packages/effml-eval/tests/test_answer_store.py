from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from effml_eval.evaluation import answer_store
from effml_eval.evaluation.answer_store import Answer, AnswerStore, Key
from effml_eval.scoring import Generation, RollingScore, Score
from effml_shared.errors import CheckpointError

ANSWERS: dict[Key, Answer] = {
    ("a" * 64, 0): Score(-1 / 3, True, 3, 2, True),
    ("b" * 64, 0): Score(-math.inf, False, 1),
    ("c" * 64, 0): RollingScore(-7.25, 3, 9, 2),
    ("d" * 64, 7): Generation('line\n "é"\u2028 \ud800', "stop", 4, 1),
}


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "answers").iterdir() if "lock" not in path.name)


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, "s") as store:
        store.add(ANSWERS, ["n2", "n1"])
        assert shards(tmp_path) == ["rank-00000-0000.jsonl.part"]
        assert store.answers == ANSWERS
    assert shards(tmp_path) == ["rank-00000-0000.jsonl"]
    with AnswerStore(tmp_path, "s") as store:
        assert store.answers == ANSWERS
        assert {type(answer) for answer in store.answers.values()} == {Score, RollingScore, Generation}
        assert (store.too_large, store.duplicates, store.damaged) == ({"n1", "n2"}, 0, 0)
        assert ("d" * 64, 7) in store
        assert ("d" * 64, 0) not in store
    with AnswerStore(tmp_path, "other") as store:
        assert not store.answers


def test_of_two_answers_the_first_counts(tmp_path: Path) -> None:
    key = ("a" * 64, 0)
    for nats in (-1.0, -2.0):
        with AnswerStore(tmp_path, "s") as store:
            store.add({key: Score(nats, True, 1)})
            assert store.answers[key] == Score(-1.0, True, 1)
    assert store.duplicates == 1
    assert shards(tmp_path) == ["rank-00000-0000.jsonl", "rank-00000-0001.jsonl"]
    with AnswerStore(tmp_path, "s") as store:
        assert (store.answers[key], store.duplicates) == (Score(-1.0, True, 1), 1)


@pytest.mark.parametrize("kept", range(-100, 0, 9))
def test_a_line_cut_short(tmp_path: Path, kept: int) -> None:
    with AnswerStore(tmp_path, "s") as store:
        store.add(ANSWERS)
    shard = tmp_path / "answers" / "rank-00000-0000.jsonl"
    os.truncate(shard, shard.stat().st_size + kept)
    shard.rename(f"{shard}.part")
    with AnswerStore(tmp_path, "s") as again:
        assert dict(list(ANSWERS.items())[:3]) == again.answers
        assert (again.unfinished, again.damaged) == (1, 0)
        again.add(ANSWERS)
    with AnswerStore(tmp_path, "s") as store:
        assert (store.answers, store.duplicates, store.damaged) == (ANSWERS, 3, 0)
        assert store.unfinished == 0


def test_damaged_lines_are_dropped(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, "s") as store:
        store.add(ANSWERS)
    path = tmp_path / "answers" / "rank-00000-0000.jsonl"
    good = path.read_bytes()
    bad = [
        b"\x00\x00\x00",
        b"[1]",
        b'{"scope": "s"}',
        b'{"scope": "s", "request": "x", "sample": 0, "kind": "guess", "answer": {}}',
        b'{"scope": "s", "request": "x", "sample": 0, "kind": "score", "answer": {"logprob": "y"}}',
        b'{"scope": "s", "request": "x", "sample": "z", "kind": "score", "answer": {"logprob": 0}}',
        b"\xff" * 9,
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(bad) + b"\n" + good)
    with AnswerStore(tmp_path, "s") as store:
        assert (store.answers, store.damaged) == (ANSWERS, len(bad))


def test_shards_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "_LONGEST", 2)
    items = list(ANSWERS.items())
    with AnswerStore(tmp_path, "s", rank=0) as first, AnswerStore(tmp_path, "s", rank=1) as second:
        first.add(dict(items[:2]))
        second.add(dict(items[2:3]))
        first.add(dict(items[3:]))
        names = ["rank-00000-0000.jsonl", "rank-00000-0001.jsonl.part", "rank-00001-0000.jsonl.part"]
        assert shards(tmp_path) == names
        assert first.answers.keys() == ANSWERS.keys() - {items[2][0]}
        with pytest.raises(CheckpointError, match=r"another process writes there"):
            AnswerStore(tmp_path, "s", rank=1)
    first.read_all()
    assert first.answers == ANSWERS
    with AnswerStore(tmp_path, "s", rank=1) as second:
        assert second.answers.keys() == {items[2][0]}


def test_memory_alone() -> None:
    with AnswerStore(None, "s") as store:
        store.add(ANSWERS)
        store.add(ANSWERS)
        assert (store.answers, store.duplicates) == (ANSWERS, 4)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be read or written \(Not a directory\)"):
        AnswerStore(tmp_path / "file", "s")
