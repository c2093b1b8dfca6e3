"""How `bench allreduce` shows its result: a table by size, the best choices, and time and bandwidth drawn."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.report import figures


def readable(size_bytes: int) -> str:
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if size_bytes >= size:
            return f"{size_bytes / size:g} {unit}"
    return f"{size_bytes} B"


def show(result: dict) -> str:
    names = list(dict.fromkeys(r["algorithm"] for r in result["rows"]))
    listed = sorted({r["bytes"] for r in result["rows"]})
    time = {(r["algorithm"], r["bytes"]): r["seconds"] for r in result["rows"]}
    lines = [f"{result['ranks']} ranks, {result['rounds']} rounds; microseconds", ""]
    lines.append("  " + " " * 28 + "".join(f"{readable(b):>12s}" for b in listed))
    for name in names:
        lines.append(f"  {name:28s}" + "".join(f"{1e6 * time[name, b]:12.1f}" for b in listed))
    lines += ["", f"  {'':28s}{'latency, us':>14s}{'GB/s on a link':>16s}"]
    for f in result["fits"]:
        if f["latency_s"] is not None:
            per_byte = f["beta_s_per_byte"] + f["gamma_s_per_byte"] / 2
            lines.append(f"  {f['algorithm']:28s}{1e6 * f['latency_s']:14.1f}{1e-9 / per_byte:16.2f}")
    lines += ["", "  best by size (?: fewer than 3 rounds, or the next best's overlap)"]
    lines += [f"    {readable(b['bytes']):>8s}  {b['algorithm']}{'' if b['clear'] else ' ?'}" for b in result["best"]]
    return "\n".join(lines + (show_choices(result["choices"]) if "choices" in result else []))


def show_choices(written: dict) -> list[str]:
    """What was written, and how a site includes it."""
    lines = ["", f"  {written['file']}: Open MPI's algorithm by size (tuned: its own choice)"]
    lines += [f"    from {readable(r['from_bytes']):>10s}  {r['algorithm']}" for r in written["rules"]]
    lines += ["  a site includes it with", "    environment:"]
    lines += [f'      {key}: "{value}"' for key, value in written["environment"].items()]
    if written["slower_than_mpi_bytes"]:
        sizes = ", ".join(map(readable, written["slower_than_mpi_bytes"]))
        lines.append(f"  without these settings MPI was faster at {sizes}: weigh it against your buckets' size")
    return lines


def plot(path: Path, result: dict) -> None:
    figure, axes = figures.panels(2, (11, 4.2))
    for name in dict.fromkeys(r["algorithm"] for r in result["rows"]):
        mine = sorted((r for r in result["rows"] if r["algorithm"] == name), key=lambda r: r["bytes"])
        x = [r["bytes"] for r in mine]
        style = {"linestyle": ":"} if name.startswith("reference") else {}
        axes[0].plot(x, [1e6 * r["seconds"] for r in mine], marker=".", label=name, **style)
        axes[1].plot(x, [1e-9 * r["busbw_bytes_per_s"] for r in mine], marker=".", label=name, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="bytes", ylabel=f"microseconds, {result['ranks']} ranks")
    axes[1].set(xscale="log", xlabel="bytes", ylabel="bus bandwidth, GB/s")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figures.save(figure, path, result)
