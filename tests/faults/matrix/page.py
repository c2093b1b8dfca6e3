"""docs/results/faults.md from the JSON lines of injections."""

from __future__ import annotations

from statistics import median

HEAD = """# Faults injected

Every fault is injected at a random moment; what must hold is checked by the row. Tiny model (16 inputs, BatchNorm,
dropout), `determinism: any-ranks`, 30 steps, a checkpoint every 3, `stall_timeout_s: 2`. Real ranks are processes
that talk over sockets by `machine.engine: torch`; nothing but the product ends them. Weights are compared with
those of a run on one rank that nothing disturbed, bit for bit; each step, epoch and evaluation is on record once.

    make faults [PART=row] [SEED=n] [COUNT=n]       # appends to runs/faults/injections.jsonl, goes on where it ended
    make faults PART=page                           # this page from that file

An injection takes about 0.1 s in process, and 4 to 12 s with ranks, on two shared cores. Not in it yet: checkpoint
writes that fail, two owners, signals, images that go in mid-run, network cuts, soak, Horovod's ranks; and rows below
whose count says `of` have not run whole. A job on a real Slurm that loses nodes: [elastic](elastic.md).

What rows found, and what was mended: a changed bit in a manifest or in `state.json` was believed, and one ended the
process; metrics with bytes that are no UTF-8 could not be read; a cross-check named both ranks of a wrong gradient in
half of all cases, for one digest had a sign and the other had none; ranks with other programs or data were not told
apart. Injections from before a mend, or from before a row's own mistake was corrected, are not counted below; those of
`rank-dies`, `bad-step`, `slow-rank` and `stopped-rank` ran before the last two mends.

One seed is one chain of injections, and the same chain again; timing between processes is the machine's.

"""


def render(rows, records: list[dict]) -> str:
    lines = ["| row | fault | must happen | injected | held | seeds | seconds: median, longest | steps lost, most |",
             "|---|---|---|---:|---:|---|---|---:|"]  # fmt: skip
    total = held = of_ranks = cases = 0
    for row in rows:
        mine = [r for r in records if r["row"] == row.name]
        good = [r for r in mine if r["verdict"] == "held"]
        if row.name.startswith("fuzz"):
            cases += len(mine)
            held -= len(good)
            total -= len(mine)
        total, held, of_ranks = total + len(mine), held + len(good), of_ranks + len(mine) * row.ranks
        seconds = sorted(r["seconds"] for r in good if r["seconds"] is not None)
        seeds = sorted({r["seed"] for r in mine})
        lost = max((r["lost"] for r in good if r["lost"] is not None), default=0)
        spread = f"{median(seconds):.2g}, {seconds[-1]:.2g}" if seconds else ""
        span = f"{seeds[0]} to {seeds[-1]}" if seeds else ""
        count = f"{len(mine)}" + ("" if len(mine) >= row.count else f" of {row.count}")
        lines.append(
            f"| `{row.name}` | {row.fault} | {row.must} | {count} | {len(good)} | {span} | {spread} | {lost} |"
        )
    said = [
        f"**{total} injections, {of_ranks} of them with real ranks; {held} held. Beside them {cases} fuzzed files.**",
        "",
    ]
    return HEAD + "\n".join([*said, *lines, "", *_examples(rows, records), *_failures(records)]) + "\n"


def _examples(rows, records: list[dict]) -> list[str]:
    lines = ["## What the user saw", "", "| row | injected | detected | said |", "|---|---|---|---|"]
    for row in rows:
        shown = next((r for r in records if r["row"] == row.name and r["verdict"] == "held" and r["said"]), None)
        if shown:
            cells = (shown["moment"], shown["detected"], shown["said"].splitlines()[0])
            lines.append(f"| `{row.name}` | " + " | ".join(_cell(text) for text in cells) + " |")
    return [*lines, ""]


def _failures(records: list[dict]) -> list[str]:
    failed = [r for r in records if r["verdict"] != "held"]
    if not failed:
        return []
    lines = ["## What did not hold", "", "| row | seed | injection | what |", "|---|---:|---:|---|"]
    return lines + [
        f"| `{r['row']}` | {r['seed']} | {r['index']} | {_cell(r['verdict'].splitlines()[0])} |" for r in failed
    ]


def _cell(text: str) -> str:
    import re

    text = re.sub(r"/tmp/\S*?/(?=run\b|packed\b|staged\b|images\b)", "", text)[:180]
    return text.replace("|", "\\|").replace("<", "&lt;")
