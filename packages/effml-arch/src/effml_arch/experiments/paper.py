"""The paper that both experiments re-test."""

from effml_shared.citations import Paper

__all__ = ["PAPER"]

PAPER = Paper(
    "The Recurrent Transformer: Greater Effective Depth and Efficient Decoding",
    "2604.21215",
    (
        "Costin-Andrei Oncescu",
        "Depen Morwani",
        "Samy Jelassi",
        "Alexandru Meterez",
        "Mujin Kwun",
        "Sham Kakade",
    ),
)
