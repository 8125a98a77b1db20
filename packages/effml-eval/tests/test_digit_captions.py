from __future__ import annotations

import pytest
import torch
from effml_eval.experiments.digit_captions import VOCABULARY, bags_of_words, caption, draw_captions, phrasings
from effml_eval.experiments.handwritten_digits import FACTS, load_digits
from effml_shared.errors import ConfigError
from torch import Tensor

CUES = {  # a reader of captions that knows nothing of the grammar
    "thin": ("thin", "fine"),
    "thick": ("thick", "bold"),
    "leaning left": ("left",),
    "leaning right": ("right",),
    "upright": ("upright", "straight"),
    "narrow": ("narrow", "slim"),
    "wide": ("wide", "broad"),
    **{
        str(number): (str(number), name)
        for number, name in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    },
}


def _facts(*true: str) -> list[bool]:
    return [name in true for name in FACTS]


def _read(text: str) -> list[bool]:
    words = set(text.replace(",", "").split())
    return [any(cue in words for cue in CUES[name]) for name in FACTS]


@pytest.mark.parametrize(
    "remarks",
    [(), ("upright",), ("thin", "leaning left", "wide"), ("thick", "leaning right", "narrow")],
)
def test_every_caption_is_another_and_says_what_it_is_said_to_say_all_of_it_true(remarks: tuple[str, ...]) -> None:
    for digit in map(str, range(10)):
        facts = _facts(digit, *remarks)
        count = phrasings(facts)
        assert count == 6 * 3 ** len(remarks)
        texts = [caption(facts, number) for number in range(count)]
        assert len({text for text, _ in texts}) == count
        for text, said in texts:
            assert said == _read(text), text
            assert said[int(digit)]
            assert all(true for true, told in zip(facts, said, strict=True) if told)
        subsets = {tuple(said) for _, said in texts}
        assert len(subsets) == 2 ** len(remarks)  # each remark is made or left out


def test_numbers_of_captions_that_do_not_exist_are_refused() -> None:
    for number in (-1, 18):
        with pytest.raises(ConfigError, match=r"^number: got -?\d+, expected a number in \[0, 18\)"):
            caption(_facts("3", "upright"), number)


def test_drawn_captions_follow_from_the_seed_and_are_equally_likely() -> None:
    facts = torch.tensor([_facts("5", "thick", "upright")]).expand(10_800, -1)

    def draw(seed: int) -> tuple[list[str], Tensor]:
        return draw_captions(facts, torch.Generator().manual_seed(seed))

    texts, said = draw(1)
    assert texts == draw(1)[0] != draw(2)[0]
    assert said.tolist() == [_read(text) for text in texts]
    counts = torch.tensor([texts.count(caption(facts[0].tolist(), number)[0]) for number in range(54)])
    assert counts.sum() == len(texts)
    assert float(((counts - 200) ** 2 / 200).sum()) < 99  # chi-square of 53 degrees of freedom: 99 in 10,000


def test_no_captions_are_drawn_of_no_images() -> None:
    texts, said = draw_captions(torch.zeros(0, len(FACTS), dtype=torch.bool), torch.Generator())
    assert texts == []
    assert said.shape == (0, len(FACTS))


def test_bags_count_words_and_the_vocabulary_is_that_of_the_grammar() -> None:
    texts, _ = draw_captions(load_digits().facts.repeat(3, 1), torch.Generator().manual_seed(0))
    bags = bags_of_words(texts)
    assert bags.sum(1).tolist() == [len(text.replace(",", "").split()) for text in texts]
    assert (bags.sum(0) > 0).all()  # no word that no caption holds
    (bag,) = bags_of_words(["a scan of the numeral 4, slanted to the left"])
    counts = {word: int(count) for word, count in zip(VOCABULARY, bag, strict=True) if count}
    assert counts == {"a": 1, "scan": 1, "of": 1, "the": 2, "numeral": 1, "4": 1, "slanted": 1, "to": 1, "left": 1}
