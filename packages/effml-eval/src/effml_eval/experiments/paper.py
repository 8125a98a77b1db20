"""The paper that both experiments re-test."""

from effml_shared.citations import Paper

__all__ = ["PAPER"]

PAPER = Paper(
    "Interpreting the linear structure of vision-language model embedding spaces",
    "2504.11695",
    ("Isabel Papadimitriou", "Huangyuan Su", "Thomas Fel", "Sham Kakade", "Stephanie Gil"),
)
