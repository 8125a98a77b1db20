import copy
import re
from html.parser import HTMLParser

import pytest
from effml_shared.reproduction_page import duration, interval_drawing, reproduction_page, tally
from hypothesis import given
from hypothesis import strategies as st

CLAIM = {
    "text": "It is <b>faster</b>",
    "paper": "40% & more",
    "unit": "% fewer steps",
    "at_least": 40.0,
    "mean": 46.25,
    "low": 41.0,
    "high": 51.5,
    "seeds": 3,
    "verdict": "holds",
}
ENTRY = {
    "name": "optim.toy",
    "status": "finished",
    "error": None,
    "claims": [
        CLAIM,
        {**CLAIM, "verdict": "does not hold"},
        {**CLAIM, "verdict": "inconclusive", "low": None, "high": None},
    ],
    "report": "optim.toy/report.html",
    "title": "A <title>",
    "paper": "Nobody, arXiv 2401.00001",
    "papers": [],
    "expected": "5 min",
    "seconds": 250.4,
    "started": "2026-01-02T03:04:05+00:00",
    "machine": "AMD <EPYC>, 2 threads",
    "versions": {"python": "3.11.7", "torch": "2.15.0", "effml-optim": "0.1.0"},
    "git": "0123456789abcdef",
}
PAPER = {
    "title": "T & U",
    "authors": ["A B", "C D"],
    "year": 2024,
    "url": "https://arxiv.org/abs/2401.00001",
    "bibtex": "@m",
}
COMING = {"name": "quant.toy", "status": "to come", "error": None, "claims": [], "report": None, "expected": "5 s"}
FAILED = {**COMING, "name": "rl.toy", "status": "failed", "error": "ValueError: <script>"}


def index(*entries, running=None):
    verdicts = [claim["verdict"] for entry in entries for claim in entry["claims"]]
    counts = {verdict: verdicts.count(verdict) for verdict in ("holds", "does not hold", "inconclusive")}
    return {
        "preset": "cpu",
        "written": "2026-01-02T03:04:05+00:00",
        "running": running,
        "counts": counts,
        "experiments": copy.deepcopy(list(entries)),
    }


class Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    void = ("meta", "br", "path", "circle", "rect")

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in self.void else [tag]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_shows_the_claim_both_numbers_and_the_verdict_in_words():
    page = reproduction_page(index(ENTRY))
    Balance(page)
    for words in (
        "3 claims from 1 paper, re-tested",
        "It is &lt;b&gt;faster&lt;/b&gt;",
        "Paper: 40% &amp; more",
        "<b>46.2</b>% fewer steps",
        "[41.0, 51.5], 3 seeds",
        "3 seeds, no interval",
        "does not hold",
        "inconclusive",
        "4 min 10 s",
        "AMD &lt;EPYC&gt;, 2 threads",
        "torch 2.15.0",
        "commit 012345678",
        'href="optim.toy/report.html"',
        'href="https://arxiv.org/abs/2401.00001"',
        "prefers-color-scheme: dark",
    ):
        assert words in page, words


def test_it_is_one_file_without_scripts_or_requests():
    page = reproduction_page(index({**ENTRY, "papers": [PAPER]}, FAILED))
    Balance(page)
    assert not re.search(r"<script|<link|<img|@import|url\(| src=", page)
    assert "ValueError: &lt;script&gt;" in page
    assert "A B and C D, <cite>T &amp; U</cite>" in page
    assert "<pre>@m</pre>" in page


@pytest.mark.parametrize("entries", [(), (COMING,), (FAILED,), (COMING, ENTRY, FAILED)])
def test_it_can_be_drawn_at_any_time(entries):
    page = reproduction_page(index(*entries, running="quant.toy"))
    Balance(page)
    assert '<meta http-equiv="refresh"' in page
    assert f"of {len(entries)} experiments done, quant.toy is running" in page
    assert '<meta http-equiv="refresh"' not in reproduction_page(index(*entries))


def test_a_rehearsal_says_so():
    page = reproduction_page({**index(ENTRY), "preset": "smoke"})
    assert "3 claims from 1 paper, only rehearsed" in page
    assert "say nothing about the papers" in page


numbers = st.none() | st.floats(-1e30, 1e30)


@given(st.floats(-1e30, 1e30), numbers, numbers, numbers)
def test_a_drawing_stays_inside_its_frame(claimed, mean, low, high):
    drawing = interval_drawing({**CLAIM, "at_least": claimed, "mean": mean, "low": low, "high": high})
    Balance(drawing)
    assert "nan" not in drawing
    places = [float(x) for x in re.findall(r'(?:M| x="|cx=")(-?[\d.]+)', drawing)]
    assert all(0 <= x <= 300 for x in places)


def test_a_drawing_is_to_scale():
    drawing = interval_drawing({**CLAIM, "at_least": 0.0, "low": 50.0, "mean": 75.0, "high": 100.0})
    claimed = float(re.search(r'class="claimed" d="M([\d.]+)', drawing)[1])
    low, high = map(float, re.search(r'class="band" d="M([\d.]+) 16H([\d.]+)', drawing).groups())
    mean = float(re.search(r'cx="([\d.]+)"', drawing)[1])
    assert high - low == pytest.approx(low - claimed, abs=0.2)
    assert mean == pytest.approx((low + high) / 2, abs=0.1)


def test_words_of_counts_and_times():
    assert tally(["holds"] * 12 + ["does not hold"] * 3 + ["inconclusive"] * 4) == "12 hold, 3 do not, 4 inconclusive"
    assert tally(["holds", "does not hold"]) == "1 holds, 1 does not"
    assert [duration(s) for s in (59.6, 60, 3599.6, 7200)] == ["1 min", "1 min", "1 h", "2 h"]
