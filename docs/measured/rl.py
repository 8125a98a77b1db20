"""Numbers of packages/effml-rl/README.md."""

from __future__ import annotations

from typing import Any

from measured import markdown
from measured.markdown import fixed, number, settings, span
from measured.results import cases, line, run

PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16 autocast, TRL's default"}
PROGRAMS = ("inline_code", "python_function")  # formats of solutions that are run to be verified
TEXTS = ("equation", "prose", "word_code", "word_function", "word_prose")  # formats that are read instead


def setting() -> str:
    """Return what the steps of GRPO were measured with."""
    one = _step("float32", "effml")
    sizes = f" of {one['layers']} layers of width {one['width']}" if "layers" in one else ""
    batch = (
        f", {one['prompts']} prompts x {one['samples']} completions of up to {one['length']} tokens" if sizes else ""
    )
    return markdown.paragraph(f"""
        One step of GRPO: sampling, reward and one update. A Llama{sizes}, {number(one["weights"] / 1e6, 2)} million
        weights{batch}; {settings(one, TRL="trl", transformers="transformers")}, TRL with the generation of
        transformers. Seconds per step, those of sampling and reward in brackets, and how many times as fast as TRL
        ([raw](../../docs/results/bench_grpo.cpu.jsonl)):
    """)


def step() -> str:
    """Return the time of a step of GRPO, and how much of it is sampling."""
    head = ("one step", "TRL", "effml, the same Hugging Face model", "effml's Transformer, the same weights")
    rows = []
    for precision, label in PRECISIONS.items():
        trl, ours, own = (_step(precision, contender) for contender in ("trl", "effml", "effml own"))
        faster = [f"{_seconds(one)}: {fixed(one['times_faster'], 2)}x" for one in (ours, own)]
        rows.append((label, _seconds(trl), *faster))
    return markdown.table(head, rows)


def bounds() -> str:
    """Return where the time of a step goes, how much single steps differ, and what was checked."""
    (trl, ours), (trl_16, ours_16) = ([_step(p, contender) for contender in ("trl", "effml")] for p in PRECISIONS)
    sampling, sampling_16 = (a["seconds_sampling"] / b["seconds_sampling"] for a, b in ((trl, ours), (trl_16, ours_16)))
    update = 100 * (1 - ours["seconds_sampling"] / ours["seconds"])
    return markdown.paragraph(f"""
        On the same model, sampling with its rewards is {number(sampling, 2)} times as fast in float32 and
        {number(sampling_16, 2)} times in bfloat16. The update, {fixed(update, 0)}% of a float32 step, bounds it. A step
        makes {number(ours["gflop"])} GFLOP of products at {number(ours["gflop_per_s"], 2)} GFLOP/s; TRL's, which reads
        a prompt with every completion and not once, {number(trl["gflop"])} at {number(trl["gflop_per_s"], 2)}.
        Gradients on one batch of rollouts differ from TRL's by {number(1e6 * ours["gradient_off"], 2)} millionths of
        their norm in float32 and {number(100 * ours_16["gradient_off"], 2)}% in bfloat16. These are medians of
        {len(ours["seconds_all"])} steps, the contenders in turn; single steps took {span(ours["seconds_all"])}
        s, TRL's {span(trl["seconds_all"])} s (float32).
    """)


def sweep() -> str:
    """Return how much faster samples at many temperatures are than loops over `generate`."""
    (ours,), (plain,) = (cases("bench_sweep", contender=contender) for contender in ("effml", "effml torch"))
    right = f", {fixed(100 * ours['accuracy'], 0)}% of them right," if ours["accuracy"] else ""
    return markdown.paragraph(f"""
        A sweep over 13 temperatures, {ours["completions"]:,} completions{right} of a Llama of
        {number(ours["weights"] / 1e6, 2)} million weights, is {fixed(ours["times_faster"], 1)} times as fast as loops
        over `generate`, and {fixed(plain["times_faster"], 1)} times where the C decoder does not serve
        ({settings(ours)}, medians of {len(ours["seconds_all"])} sweeps,
        [raw](../../docs/results/bench_sweep.cpu.jsonl)).
    """)


def sandbox() -> str:
    """Return rates of the sandbox, of its contenders, and of verifiers."""
    one, two = (line("bench_sandbox", case="programs", contender="effml", workers=workers) for workers in (1, 2))
    unprotected = line("bench_sandbox", case="programs", contender="exec")
    over = line("bench_sandbox", case="timeouts of 0.2 s")["seconds_over"]
    run_formats, read_formats = (
        [line("bench_sandbox", case=f"verified, {name}")["per_second"] for name in formats]
        for formats in (PROGRAMS, TEXTS)
    )
    return markdown.paragraph(f"""
        Programs of a few lines ([raw](../../docs/results/bench_sandbox.cpu.jsonl)): the sandbox runs
        {number(one["per_second"])} per second with one worker and {number(two["per_second"])} with two,
        {fixed(one["times_faster"], 1)} and {fixed(two["times_faster"], 1)} times as many as a fresh
        interpreter for each; what bounds it is a process per program, and `exec` without any protection runs
        {number(unprotected["per_second"])}. A program that never ends is stopped {number(1e3 * over, 1)} ms after its
        time is up. Solutions that are programs are verified at {span(run_formats, 3)} per second with two
        workers, those that are read at {span(read_formats, 3)}.
    """)


def claims() -> str:
    return markdown.claims("rl.wall")


def policies() -> str:
    """Return accuracy and coverage of every policy, before and after."""
    head = ("problems", "policy", "P1*", "Cov*", "change of Cov*, 95% over seeds", "DI")
    rows = [
        (
            row["problems"],
            row["policy"],
            _percent(row["P1* (%)"]),
            _percent(row["Cov* (%)"]),
            "–" if row["change of Cov*"] is None else f"{row['change of Cov*']:+.1f} ± {fixed(row['± 95%'], 1)}",
            fixed(row["removed (DI)"], 2),
        )
        for row in run("rl.wall")["table"]
    ]
    return markdown.table(head, rows)


def limits() -> str:
    """Return what the effects are made of, and what made them."""
    found = run("rl.wall")
    low = f"{found['temperatures'][0]:g}"
    before = next(row for row in found["table"] if (row["problems"], row["policy"]) == ("practised", "fine-tuned"))
    fall = before[f"P1({low}) - P1(1)"]
    practised, test = (
        [change for change, _, _ in found["walls"][problems]["GRPO, few"]] for problems in ("practised", "test")
    )
    return markdown.paragraph(f"""
        Before reinforcement, accuracy on the practised problems falls by {fixed(fall, 1)} points from temperature {low}
        to 1, which is all that can be flattened. Coverage is the share of problems solved at least once, a noisy
        extreme: after GRPO on few problems it changes, seed by seed, by {min(practised):+.1f} to {max(practised):+.1f}
        points on the practised problems and by {min(test):+.1f} to {max(test):+.1f} on test problems. More seeds narrow
        the intervals. {markdown.made("rl.wall")}
    """)


def _step(precision: str, contender: str) -> dict[str, Any]:
    (found,) = cases("bench_grpo", precision=precision, contender=contender)
    return found


def _seconds(one: dict[str, Any]) -> str:
    return f"{fixed(one['seconds'], 3)} s ({fixed(one['seconds_sampling'], 3)})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{fixed(value, 0)}%"
