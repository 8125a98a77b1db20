"""The miniature: its words, its three formats, and the small programs that are added up."""

import numpy as np
import pytest
from effml_shared.data.miniature import MINIATURE_FORMATS, MiniatureTokenizer, miniature_problems
from effml_shared.data.solution_formats import find_format
from effml_shared.data.word_problems import SPLITS, WordProblem
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

CODE, FUNCTION, PROSE = MINIATURE_FORMATS
PROBLEM = WordProblem("Q has 5 gets 4 loses 2 ?", 5, (("+", 4), ("-", 2)))
TOKENIZER = MiniatureTokenizer()


def test_renderings():
    assert FUNCTION.render(PROBLEM) == "DEF x = 5 ; x = x + 4 ; x = x - 2 ; RET x"
    assert CODE.render(PROBLEM) == "<code> 5 + 4 - 2 </code> <out> 7 </out>"
    assert PROSE.render(PROBLEM) == "so 5 then + 4 = 9 then - 2 = 7 ans 7"


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_is_in_words_of_the_vocabulary_and_right_in_every_format(split):
    for problem in miniature_problems(seed=3).problems(60, split):
        for spec in MINIATURE_FORMATS:
            text = spec.render(problem)
            assert find_format(text, MINIATURE_FORMATS) is spec
            assert spec.answer(text) == problem.answer
            for words in (problem.question, text):
                ids = TOKENIZER.encode(words)
                assert TOKENIZER.unk_id not in ids
                assert TOKENIZER.decode(ids) == words


def test_a_wrong_word_makes_a_wrong_answer():
    for problem in miniature_problems().problems(20):
        changed = WordProblem(
            "", problem.start, (*problem.steps[:-1], (problem.steps[-1][0], problem.steps[-1][1] + 1))
        )
        for spec in MINIATURE_FORMATS:
            assert spec.answer(spec.render(changed)) != problem.answer


@pytest.mark.parametrize(
    ("text", "label", "answer"),
    [
        ("<code> 9 + 9 </code> <out> 96 </out> ans 4", CODE, 18),
        ("<code> 9 + </code> ans 18", CODE, None),
        ("<code> </code> ans 18", CODE, None),
        ("<code> x </code>", CODE, None),
        ("<code> 9 9 </code>", CODE, None),
        ("<code> 9 * 2 </code>", CODE, None),
        ("</code> <code> 1 </code> <code> 2 </code>", CODE, 1),
        ("<code> 18", PROSE, 18),
        ("DEF x = 3 ; RET x", FUNCTION, 3),
        ("DEF RET 18", FUNCTION, 18),
        ("DEF x = 3 ; RET x x", FUNCTION, 3),
        ("DEF RET x", FUNCTION, None),
        ("DEF x = 3 ; RET", FUNCTION, None),
        ("DEF x = 3 RET x", FUNCTION, None),
        ("DEF x = 3 ; 18", FUNCTION, None),
        ("DEF x = x + 1 ; RET x", FUNCTION, None),
        ("DEF x = 3 ; x = x + x - 1 ; RET x ans 9", FUNCTION, 5),
        ("DEF x = 3 ; RET x DEF x = 4 ; RET x", FUNCTION, 4),
        ("so 18", PROSE, 18),
        ("ans 18 then 3", PROSE, 18),
        ("ans ans", None, None),
        ("18x 1.5 99999999999", None, None),
        ("", None, None),
    ],
)
def test_by_hand(text, label, answer):
    found = find_format(text, MINIATURE_FORMATS)
    assert found is label
    assert found is None or found.answer(text) == answer


@given(st.lists(st.sampled_from(TOKENIZER.words), max_size=40))
def test_any_words(words):
    text = " ".join(words)
    found = find_format(text, MINIATURE_FORMATS)
    assert found is None or isinstance(found.answer(text), int | None)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20))
def test_ids_round_trip(ids):
    kept = [i for i in ids if i not in (TOKENIZER.pad_id, TOKENIZER.eos_id)]
    assert TOKENIZER.encode(TOKENIZER.decode(ids)).tolist() == kept


def test_what_is_no_word():
    assert TOKENIZER.encode("Q 50 -21 QQ").tolist() == [3, 0, 0, 0]
    assert TOKENIZER.decode(np.array([-1, 10**6])) == "<unk> <unk>"
    assert len(set(TOKENIZER.words)) == TOKENIZER.vocab_size == 92


def test_totals_must_be_words():
    miniature_problems(ops=(2, 4), ood_ops=(3, 3))
    for settings in ({"ood_ops": (5, 6)}, {"numbers": (1, 20)}):
        with pytest.raises(ConfigError, match=r"got totals of up to"):
            miniature_problems(**settings)
