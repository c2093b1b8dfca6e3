"""docs/results/faults.md from the JSON lines of injections."""

from __future__ import annotations

import re
from statistics import median

HEAD = """# Faults injected

Every fault is injected at a random moment; what must hold is checked by the row. Tiny model (16 inputs, BatchNorm,
dropout), `determinism: any-ranks`, 30 steps, a checkpoint every 3, `stall_timeout_s: 2`. Real ranks are processes
that talk over sockets by `machine.engine: torch`, in `stop-` rows also Horovod's over MPI by `launch`, in `slurm`
those of a real Slurm; nothing but the product ends them. Weights are compared with those of a run on one rank that
nothing disturbed, bit for bit; each step, epoch and evaluation is on record once.

    make faults                                     # all rows; appends to runs/faults/injections.jsonl, goes on there
    make faults MINUTES=60                          # begins no chain after so long
    make faults PART=slurm SEED=1 COUNT=8           # rows whose names begin so
    make faults PART=page                           # this page from that file

One seed is one chain of injections, and the same chain again; timing between processes is the machine's. A chain is on
record as a whole or not at all. Rows whose count says `of` have not run whole. A job on a real Slurm that loses nodes:
[elastic](elastic.md). What is not in it: GPUs, more than one machine.

What rows found is mended, with a test each:

- a changed bit in a manifest or in `state.json` was believed, and one ended the process; metrics with bytes that are no
  UTF-8 could not be read, and a record whose key had changed by a bit ended a resume with a traceback
- a cross-check named both ranks of a wrong gradient in half of all cases
- ranks with other programs or data were not told apart
- a run that skips bad images was refused at its next start once an image had gone
- the network cut in an evaluation: the job hung for ever; in a checkpoint: for ten times `stall_timeout_s`; and the
  message named all ranks, and not the network
- a rank that ended while others were in a checkpoint or an evaluation: a traceback on each of them
- a second Ctrl-C that came at once was taken for the first; one while a data set hung waited for it; and any lost the
  checkpoint that was being written
- an extended header of a tar that says an absurd length of itself: a traceback

Known and left: where an image changes between the reads of two ranks, a cross-check ends a run that skips bad images,
and names the one that read it first; the message says that this looks so.

Injections that did not hold are not counted once their seed held after the mend. All rows ran whole on 2026-11-29 on
one commit, several side by side and beside other work (load 3 to 40). One injection did not hold, the last of the list
above. `slurm` was begun again twice for faults of its own: it asked for a job's log while the controller was away, and
waited for a word of `sinfo` that never came. `bits-small-files`, whose lease a start replaced before it was read, and
rows that later mends touch ran again after these.

## A long run

20,000 steps on 4 ranks with checkpoints, evaluations, preflight and cross-check (`tests/faults/soak.py`; 57 minutes,
load 10 to 70). Medians of a tenth of the run, from the second tenth to the last: resident memory of a rank 649 to 616
MB and 632 to 599, most of it files of torch that ranks share; descriptors 18 and 17, threads 14 and 12 from the fifth
tenth to the last. Nothing grew.

## How much of the time is training

A rank that dies every ten minutes, and the job started again at once: `make train`'s recipe on 2 ranks, with
`checkpoint.minutes: auto` told of a failure every ten minutes; 3 failures, two cores, load 9 to 16
(`tests/faults/effective.py`). Of 1,808 s 94.8 % went into steps that count, stalls of 251 checkpoints (8.9 s) left out;
67.5 s into start-up (four starts), 13.4 s into steps done again, 5.1 s passed until the job had ended. Nothing had to
wait in a queue.

## Rows

"""
COLUMNS = ("row", "fault", "must happen", "injected", "held", "seeds", "seconds to the end: median, longest",
           "steps lost, most", "s each")  # fmt: skip
RIGHT = (3, 4, 7, 8)


def render(rows, records: list[dict]) -> str:
    mine = {row.name: [r for r in records if r["row"] == row.name] for row in rows}
    known = [r for row in rows for r in mine[row.name] if not row.name.startswith("fuzz")]
    ranks = sum(len(mine[row.name]) for row in rows if row.ranks)
    held = sum(r["verdict"] == "held" for r in known)
    cases = sum(r["cases"] for row in rows if row.name.startswith("fuzz") for r in mine[row.name])
    total = f"**{len(known)} injections, {ranks} of them with real ranks; {held} held."
    lines = [f"{total} Beside them {cases} fuzzed files.**", "", "| " + " | ".join(COLUMNS) + " |",
             "|" + "|".join("---:" if i in RIGHT else "---" for i in range(len(COLUMNS))) + "|"]  # fmt: skip
    lines += [_line(row, mine[row.name]) for row in rows]
    slices = [r for r in records if r["row"] == "slice" and r["injections"]]
    parts = [lines, _slices(slices), _examples(rows, mine), _failures(records)]
    return HEAD + "\n".join(line for part in parts for line in (*part, "") if part).rstrip() + "\n"


def _line(row, mine: list[dict]) -> str:
    good = [r for r in mine if r["verdict"] == "held"]
    done, seconds = sum(r["cases"] for r in mine), sorted(r["seconds"] for r in good if r["seconds"] is not None)
    seeds = sorted({r["seed"] for r in mine})
    cost = sum(r["cost_s"] for r in mine) / done if done else row.cost_s
    cells = (f"`{row.name}`", row.fault, row.must, f"{done}" + ("" if done >= row.count else f" of {row.count}"),
             sum(r["cases"] for r in good), _span(seeds),
             f"{median(seconds):.2g}, {seconds[-1]:.2g}" if seconds else "",
             max((r["lost"] for r in good if r["lost"] is not None), default=""),
             f"{cost:.2g}" if done else "")  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _span(seeds: list[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}" if seeds else ""


def _slices(slices: list[dict]) -> list[str]:
    """When it ran, and beside what."""
    if not slices:
        return []
    lines = ["## Slices", "", "| begun (UTC) | rows | from seed | injected | minutes | cores | load: begin, end |",
             "|---|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for s in slices:
        load = ", ".join(f"{value:.0f}" for value in s["load"])
        part, began = s["part"] or "all", s["began"].replace("T", " ")
        lines.append(f"| {began} | {part} | {s['seed']} | {s['injections']} | {s['seconds'] / 60:.1f} | {s['cores']} | "
                     f"{load} |")  # fmt: skip
    return lines


def _examples(rows, mine: dict[str, list[dict]]) -> list[str]:
    lines = ["## What the user saw", "", "| row | injected | detected | said |", "|---|---|---|---|"]
    for row in rows:
        shown = next((r for r in mine[row.name] if r["verdict"] == "held" and r["said"]), None)
        if shown:
            cells = (shown["moment"], shown["detected"], shown["said"].splitlines()[0])
            lines.append(f"| `{row.name}` | " + " | ".join(_cell(text) for text in cells) + " |")
    return lines


def _failures(records: list[dict]) -> list[str]:
    failed = [r for r in records if r.get("verdict", "held") != "held"]
    if not failed:
        return []
    lines = ["## What did not hold", "", "| row | seed | injection | what |", "|---|---:|---:|---|"]
    return lines + [
        f"| `{r['row']}` | {r['seed']} | {r['index']} | {_cell(r['verdict'].splitlines()[0])} |" for r in failed
    ]


def _cell(text: str) -> str:
    text = re.sub(r"/tmp/\S*?/(?=run\b|checkpoints\b|packed\b|staged\b|images\b|disk\b)", "", text)
    text = re.sub(r"/\S+/(?=\w+\.cc:)", "", text)[:180]  # where somebody compiled torch
    return text.replace("|", "\\|").replace("<", "&lt;")
