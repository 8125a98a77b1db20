from __future__ import annotations

from effml_eval.scoring.stop_strings import StopStrings, find_stop, is_certain
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter
from effml_shared.data.tokenizers import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text("ab", max_size=12)
STOP = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
BYTES = TokenizerAdapter(ByteTokenizer())


def test_the_earliest_of_several() -> None:
    assert find_stop("one two three", ["three", "two"]) == 4
    assert find_stop("stop", ["stop"]) == 0
    assert find_stop("aab", ["ab", "aab"]) == 0  # overlapping
    assert find_stop("nothing", ["x"]) is None
    assert find_stop("nothing", []) is None


@given(TEXT, TEXT, STOP)
def test_what_is_certain_stays(text: str, more: str, stop: list[str]) -> None:
    place = find_stop(text, stop)
    if place is not None and is_certain(text, place, stop):
        assert find_stop(text + more, stop) == place


@given(TEXT, STOP)
def test_what_is_not_certain_may_change(text: str, stop: list[str]) -> None:
    place = find_stop(text, stop)
    if place is not None and not is_certain(text, place, stop):
        changed = [find_stop(text + string[n:], stop) for string in stop for n in range(len(string))]
        assert any(found is not None and found < place for found in changed)


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=2))
def test_watching_tokens_agrees_with_the_whole_text(text: str, stop: list[str]) -> None:
    text, stop = text.encode(errors="replace").decode(), [s.encode(errors="replace").decode() for s in stop]
    watch, ids = StopStrings(BYTES, stop), BYTES.encode(text)
    decided = next((n for n in range(1, len(ids) + 1) if watch.decided(ids[:n])), None)
    if decided is None:
        place = find_stop(text, stop)
        assert place is None or not is_certain(text, place, stop)
    elif "\ufffd" not in "".join(stop):
        written = BYTES.decode(ids[:decided])
        place = find_stop(written, stop)
        assert place is not None
        assert text[:place] == written[:place]
        assert find_stop(text, stop) == place


def test_nothing_to_look_for() -> None:
    assert not StopStrings(BYTES, []).decided([1, 2, 3])
