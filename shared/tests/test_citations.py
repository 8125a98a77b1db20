import re

import pytest
from effml_shared.citations import Paper, bibtex
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


def test_an_entry_has_what_is_known():
    paper = Paper("SOAP: Shampoo using Adam", "2409.11321", ["Nikhil Vyas", "Depen Morwani"])
    assert bibtex(paper) == (
        "@misc{vyas2024soap,\n"
        "  title = {{SOAP: Shampoo using Adam}},\n"
        "  author = {Nikhil Vyas and Depen Morwani},\n"
        "  year = {2024},\n"
        "  eprint = {2409.11321},\n"
        "  archivePrefix = {arXiv},\n"
        "  url = {https://arxiv.org/abs/2409.11321},\n"
        "}"
    )


def test_unknown_authors_stay_out():
    assert "author" not in bibtex(Paper("T", "2409.11321"))


@pytest.mark.parametrize(
    ("authors", "title", "key"),
    [
        (["Core Francisco Park"], "Any-Order Things", "park2024any"),
        (["van der Berg, Jan"], "The End", "vanderberg2024end"),
        (["Łukasz Kaiser"], "On a Thing", "kaiser2024thing"),
        (["Søren Müller"], "42", "muller202442"),
        ([], "SOAP: more", "2024soap"),
        ([], "…", "2024"),
    ],
)
def test_keys(authors, title, key):
    assert Paper(title, "2409.11321", authors).key == key


@given(st.text())
def test_braces_of_any_title_balance_and_nothing_ends_the_entry_early(title):
    entry = bibtex(Paper(title, "2409.11321", ["A B"]))
    depth = 0
    for position, character in enumerate(entry):
        depth += (character == "{") - (character == "}")
        assert depth > 0 or position <= entry.index("{") or position == len(entry) - 1
    assert depth == 0
    assert not re.search(r"(?<!\\)[&%$#_]", entry.split("title = ")[1].split("\n")[0])


@pytest.mark.parametrize("arxiv", ["", "2409", "arXiv:2409.11321", "2409.11321v2", "2413.00001", "2409.11321\n"])
def test_an_id_that_is_none(arxiv):
    with pytest.raises(ConfigError, match="arxiv: got"):
        Paper("T", arxiv)
