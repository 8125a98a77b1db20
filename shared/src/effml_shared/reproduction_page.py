"""The page of a reproduction: what every paper claims, what was measured here, and whether it holds.

One file of HTML with its style and drawings inside: no script, no server, no request. Verdicts differ in colour (blue
and orange, which all eyes tell apart), in shape and in words. Intervals are drawn on a scale of their own per claim,
with the claimed side tinted. A page of something that still runs loads itself anew.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effml_shared.report import mean_with_interval, number

__all__ = ["VERDICTS", "duration", "reproduction_page", "tally"]

VERDICTS = ("holds", "does not hold", "inconclusive")
_WIDTH, _HEIGHT, _MARGIN = 300, 46, 10  # of a drawn interval, px
_RULE = (
    "A claim holds when the whole 95% interval over seeds lies on the claimed side of the claimed size, and does not "
    "hold when all of it lies on the other side; anything else is inconclusive."
)
_REHEARSAL = "Preset smoke takes seconds to show that everything runs here. Its verdicts say nothing about the papers."
_SHAPES = {  # in a square of 16
    "holds": '<circle cx="8" cy="8" r="8"/><path class="ink" d="M4.4 8.3l2.5 2.5 4.7-5.2"/>',
    "does": '<rect x=".8" y=".8" width="14.4" height="14.4" rx="3"/><path class="ink" d="M5 5l6 6M11 5l-6 6"/>',
    "inconclusive": '<circle class="ring" cx="8" cy="8" r="6.8"/>'
    '<path class="line" d="M4.8 8.7c1.1-1.7 2.2-1.7 3.2-.7s2.1 1 3.2-.7"/>',
    "failed": '<path d="M8 .6L15.8 15H.2z"/><path class="ink" d="M8 5.6v4.2M8 12.1v.7"/>',
    "open": '<circle class="dots" cx="8" cy="8" r="6.8"/>',
}


def reproduction_page(index: dict[str, Any]) -> str:
    """Return the page of an index, as `Reproduction.index` gives it."""
    entries = index["experiments"]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    refresh = '<meta http-equiv="refresh" content="15">' if index["running"] else ""
    words = tally([claim["verdict"] for entry in entries for claim in entry["claims"]])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{refresh}<title>effml: {html.escape(words)}</title><style>{style}</style></head><body><main>"
        f"{_head(index, words)}{_overview(entries)}{''.join(map(_card, entries))}{_citations(entries)}"
        "</main></body></html>\n"
    )


def tally(verdicts: Sequence[str]) -> str:
    """Count verdicts in words.

    >>> tally(["holds", "does not hold", "holds"]), tally([])
    ('2 hold, 1 does not', 'nothing judged yet')
    """
    counts = [(verdicts.count(verdict), verdict) for verdict in VERDICTS]
    return ", ".join(f"{count} {_word(verdict, count)}" for count, verdict in counts if count) or "nothing judged yet"


def duration(seconds: float) -> str:
    """Say a time as people do.

    >>> [duration(seconds) for seconds in (0.4, 45, 250, 3660)]
    ['1 s', '45 s', '4 min 10 s', '1 h 1 min']
    """
    whole = max(round(seconds), 1)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join([*parts, f"{rest} s"] if not hours and (rest or not minutes) else parts)


def _word(verdict: str, count: int) -> str:
    return _words(verdict, count).removesuffix(" hold") if verdict == "does not hold" else _words(verdict, count)


def _words(verdict: str, count: int) -> str:
    plural = {"holds": "hold", "does not hold": "do not hold"} if count != 1 else {}
    return plural.get(verdict, verdict)


def _head(index: dict[str, Any], words: str) -> str:
    entries, counts = index["experiments"], index["counts"]
    judged, total = sum(counts.values()), len(entries)
    finished = [entry for entry in entries if entry["status"] == "finished"]
    papers = {_arxiv(entry) or entry["name"] for entry in finished}
    bar = "".join(
        f'<span class="{_class(verdict)}" style="flex-grow:{count}"></span>'
        for verdict, count in counts.items()
        if count
    )
    legend = "".join(
        f'<li class="{_class(verdict)}"><b>{count}</b>{_mark(_class(verdict))} {_words(verdict, count)}</li>'
        for verdict, count in counts.items()
    )
    failed = [entry for entry in entries if entry["status"] == "failed"]
    legend += f'<li class="failed"><b>{len(failed)}</b>{_mark("failed")} failed to run</li>' if failed else ""
    if index["running"]:
        state = f"{len(finished)} of {total} experiments done, {html.escape(index['running'])} is running"
    elif len(finished) < total:
        state = f"{len(finished)} of {total} experiments done"
    else:
        state = f"{total} experiment{'s' * (total != 1)}"
    seconds = [entry["seconds"] for entry in finished if entry["seconds"] is not None]
    machines = dict.fromkeys(entry["machine"] for entry in finished)
    facts = [
        state,
        *([f"{duration(sum(seconds))} in all"] if seconds and len(seconds) == len(finished) else []),
        *([html.escape(" and ".join(machines))] if machines else []),
        f"preset {html.escape(index['preset'])}",
        html.escape(index["written"][:10]),
    ]
    rehearsal = index["preset"] == "smoke"
    how = "only rehearsed" if rehearsal else "re-tested"
    claims = f"{judged} claim{'s' * (judged != 1)} from {len(papers)} paper{'s' * (len(papers) != 1)}"
    return (
        f'<header><p class="brand">effml</p><h1>{claims if judged else "Claims from papers"}, {how}</h1>'
        f'<div class="bar" role="img" aria-label="{html.escape(words)}">{bar}</div><ul class="legend">{legend}</ul>'
        f'<p class="facts">{" <i>·</i> ".join(facts)}</p>'
        f'<p class="rule">{_REHEARSAL if rehearsal else _RULE}</p></header>'
    )


def _overview(entries: list[dict[str, Any]]) -> str:
    rows = "".join(
        f'<a href="#{html.escape(entry["name"])}"><span class="name">{html.escape(entry["name"])}</span>'
        f'<span class="title">{html.escape(entry.get("title", ""))}</span>'
        f'<span class="marks">{_marks(entry)}</span><span class="time">{html.escape(_time(entry))}</span></a>'
        for entry in entries
    )
    return f'<nav aria-label="Experiments">{rows}</nav>'


def _marks(entry: dict[str, Any]) -> str:
    marks = [_mark(_class(claim["verdict"]), f"{claim['verdict']}: {claim['text']}") for claim in entry["claims"]]
    marks += [_mark("failed", "failed to run")] if entry["status"] == "failed" else []
    return "".join(marks) or _mark("open", entry["status"])


def _time(entry: dict[str, Any]) -> str:
    if entry["status"] == "finished":
        return duration(entry["seconds"]) if entry["seconds"] is not None else ""
    return str(entry["status"])


def _card(entry: dict[str, Any]) -> str:
    name = html.escape(entry["name"])
    verdicts = [claim["verdict"] for claim in entry["claims"]]
    state = tally(verdicts) if verdicts else entry["status"]
    state += " · not the preset's configuration" if entry.get("changed") else ""
    state += f", takes {entry['expected']}" if state == "to come" and entry.get("expected") else ""
    trace = f' <a href="{html.escape(entry["traceback"])}">traceback</a>' if entry.get("traceback") else ""
    error = f'<p class="error">{_mark("failed")}{html.escape(entry["error"])}{trace}</p>' if entry["error"] else ""
    return (
        f'<section id="{name}"><div class="top"><span class="name">{name}</span><span>{html.escape(state)}</span></div>'
        f'<h2>{html.escape(entry.get("title", name))}</h2><p class="paper">{_paper(entry)}</p>{error}'
        f"{''.join(map(_claim, entry['claims']))}{_foot(entry)}</section>"
    )


def _paper(entry: dict[str, Any]) -> str:
    if not entry.get("papers"):
        text = html.escape(entry.get("paper", ""))
        return re.sub(r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', text)
    lines = []
    for paper in entry["papers"]:
        names = paper["authors"]
        who = (
            f"{names[0]} et al." if len(names) > 3 else " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
        )
        lines.append(
            f"{html.escape(f'{who}, ') if who else ''}<cite>{html.escape(paper['title'])}</cite>, "
            f'<a href="{html.escape(paper["url"])}">arXiv {html.escape(paper["url"].rpartition("/")[2])}</a>'
        )
    return "<br>".join(lines)


def _claim(claim: dict[str, Any]) -> str:
    kind = _class(claim["verdict"])
    seeds = f"{claim['seeds']} seed{'s' * (claim['seeds'] != 1)}"
    mean, interval = (text.replace("-", "−") for text in mean_with_interval(claim))
    inside = f"{interval}, " if _known(claim) else ""
    seeds += "" if inside else ", no interval"
    ours = f"<b>{mean}</b>{html.escape(claim['unit'])}" if claim["mean"] is not None else "no number"
    return (
        f'<div class="claim {kind}"><p class="verdict">{_mark(kind)}{html.escape(claim["verdict"])}</p>'
        f'<div class="text"><p>{html.escape(claim["text"])}</p>'
        f'<p class="quiet">Paper: {html.escape(claim["paper"])}</p></div>'
        f'<div class="ours"><p>{ours}</p>'
        f'<p class="quiet">{inside}{seeds}</p></div>{interval_drawing(claim)}</div>'
    )


def interval_drawing(claim: dict[str, Any]) -> str:
    """Draw the measured mean and interval on a line, the claimed size, and the claimed side tinted."""
    claimed, mean = claim["at_least"], claim["mean"]
    values = [value for value in (claimed, mean, claim["low"], claim["high"]) if value is not None]
    low, high = min(values), max(values)
    room = (high - low or abs(claimed) or 1.0) * 0.12
    low, high = low - room, high + room

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) / (high - low) * (_WIDTH - 2 * _MARGIN), 1)

    at, right = place(claimed), _WIDTH - _MARGIN
    anchor = "start" if at < 60 else "end" if at > _WIDTH - 60 else "middle"
    parts = [
        f'<rect class="side" x="{at}" y="4" width="{round(right - at, 1)}" height="24"/>',
        f'<path class="axis" d="M{_MARGIN} 16H{right}"/>',
    ]
    if mean is not None:
        known = _known(claim)
        ends = (place(claim["low"]), place(claim["high"])) if known else (_MARGIN, right)
        parts += [
            f'<path class="{"band" if known else "unknown"}" d="M{ends[0]} 16H{ends[1]}"/>',
            *([f'<path class="cap" d="M{ends[0]} 10v12M{ends[1]} 10v12"/>'] if known else []),
            f'<circle cx="{place(mean)}" cy="16" r="5"/>',
        ]
    parts += [
        f'<path class="claimed" d="M{at} 2v28"/>',
        f'<text x="{at}" y="42" text-anchor="{anchor}">holds from {_number(claimed)}</text>',
    ]
    inside = f", interval {_number(claim['low'])} to {_number(claim['high'])}" if _known(claim) else ""
    words = f"{_number(mean)}{inside}; holds from {_number(claimed)}"
    return (
        f'<svg class="interval" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
    )


def _known(claim: dict[str, Any]) -> bool:
    return None not in (claim["mean"], claim["low"], claim["high"])


def _number(value: float | None) -> str:
    return number(value, 3).replace("-", "−")


def _foot(entry: dict[str, Any]) -> str:
    facts = []
    if "machine" in entry:
        own = f"effml-{entry['name'].split('.')[0]}"
        versions = [
            f"{name} {entry['versions'][name]}" for name in ("python", "torch", own) if name in entry["versions"]
        ]
        facts = [entry["machine"], *versions, *([f"commit {entry['git'][:9]}"] if entry["git"] else [])]
        facts = [*([duration(entry["seconds"])] if entry["seconds"] is not None else []), *facts, entry["started"][:10]]
    report = f'<a class="more" href="{html.escape(entry["report"])}">full report</a>' if entry["report"] else ""
    return f"<footer><span>{' <i>·</i> '.join(html.escape(fact) for fact in facts)}</span>{report}</footer>"


def _citations(entries: list[dict[str, Any]]) -> str:
    found = dict.fromkeys(paper["bibtex"] for entry in entries for paper in entry.get("papers", []))
    if not found:
        return ""
    text = html.escape("\n\n".join(found))
    return f"<details><summary>Cite these papers (BibTeX)</summary><pre>{text}</pre></details>"


def _arxiv(entry: dict[str, Any]) -> str | None:
    match = re.search(r"arXiv (\d{4}\.\d{4,5})", entry.get("paper", ""))
    return match[1] if match else None


def _class(verdict: str) -> str:
    return verdict.split()[0]


def _mark(kind: str, title: str = "") -> str:
    tip = f"<title>{html.escape(title)}</title>" if title else ""
    hidden = "" if title else ' aria-hidden="true"'
    return f'<svg class="mark {kind}" viewBox="0 0 16 16"{hidden}>{tip}{_SHAPES[kind]}</svg>'
