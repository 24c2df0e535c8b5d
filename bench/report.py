"""What a run of the benchmarks says: records, a Markdown table, a picture, and a folder per device.

    python -m bench.report [folder ...]

draws the tables and pictures of saved results again; by default of all folders in bench/results.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import COMPETITORS, SHAPES, Case, dtypes
from bench.measure import Measured

RESULTS = Path(__file__).resolve().parent / "results"
# colours that the colour-blind tell apart (Okabe and Ito)
COLOURS = {"eager": "#999999", "compile": "#E69F00", "ours-torch": "#56B4E9", "ours-triton": "#0072B2"}
HEADINGS = ["rows", "competitor", "median µs", "p20-p80 µs", "GB/s", "of copy", "vs eager", "peak MiB"]
GPU_HEADINGS = ["launches", "host µs"]


def record(
    case: Case,
    competitor: str,
    measured: Measured,
    *,
    floor: int,
    eager: Sequence[float] | None,
    peak: int | None,
    launches: int | None,
    copy_bandwidth: float,
) -> dict[str, Any]:
    """One line of the results. Times are seconds per call; memory and the floor are bytes."""
    seconds = measured.seconds
    median = statistics.median(seconds)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "op": case.op.name,
        "shape": case.shape,
        "rows": case.rows,
        "variant": case.variant,
        "competitor": competitor,
        "median_s": median,
        "p20_s": fifths[0],
        "p80_s": fifths[3],
        "rounds": len(seconds),
        "reads": list(case.op.reads),
        "writes": list(case.op.writes),
        "floor_bytes": floor,
        "floor_bytes_per_element": floor // (case.rows * math.prod(SHAPES[case.shape])),
        "bytes_per_s": floor / median,
        "share_of_copy": floor / median / copy_bandwidth,
        # ratios within a round, so that a slow spell of the machine cancels
        "speedup_over_eager": eager and statistics.median(e / t for e, t in zip(eager, seconds, strict=False)),
        "peak_extra_bytes": peak,
        "launches": launches,
        "host_s": measured.host_seconds,
        "timed_by": measured.timed_by,
    }


def results(
    device: torch.device,
    copy_bandwidth: float,
    records: list[dict[str, Any]],
    skipped: dict[str, list[str]],
    failed: list[str],
) -> dict[str, Any]:
    model_dtype, latent_dtype = (str(dtype).removeprefix("torch.") for dtype in dtypes(device))
    return {
        "device": device_name(device),
        "kind": device.type,
        "l2_bytes": torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "model_output_dtype": model_dtype,
        "latent_dtype": latent_dtype,
        "copy_bytes_per_s": copy_bandwidth,
        "cases": records,
        "skipped": skipped,
        "failed": failed,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    name = model.group(1) if model else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", name, flags=re.IGNORECASE).strip()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def commit() -> str | None:
    """The commit, with a + after it if files of the package or of the benchmarks differ from it."""

    def git(*arguments: str) -> str:
        folder = RESULTS.parent.parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "pcpo_fast", "kernels", "reference", "bench/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(results: dict[str, Any]) -> str:
    """Everything but the picture, as Markdown that is also readable on a terminal."""
    on_gpu = results["kind"] == "cuda"
    copy = results["copy_bytes_per_s"]
    how = (
        "Device time of a call in replays of a CUDA graph, inputs and outputs rotating through more than three times "
        "the L2 cache; 'host' is the wall time that handing over one call takes without a graph."
        if on_gpu
        else "Wall time of a call on one thread: the mean of four in a row after one that "
        "is not counted. Inputs may stay in the CPU's caches from call to "
        "call, for everyone alike."
    )
    versions = f"torch {results['torch']}, triton {results['triton'] or 'not installed'}, Python {results['python']}"
    lines = [
        f"# {results['device']}",
        "",
        f"{versions}; commit {results['commit'] or 'unknown'}; {results['date']}. Model outputs in "
        f"{results['model_output_dtype']}, latents and noise in {results['latent_dtype']}.",
        "",
        f"{how} Competitors take turns; 'vs eager' is the median over rounds of the ratio within a round. GB/s count "
        "the floor below, for everyone the same. 'of copy' divides by the measured copy bandwidth, "
        f"{copy / 1e9:.1f} GB/s (bytes read and written, buffers of {'1 GiB' if on_gpu else '256 MiB'}); the lines "
        "'copy' copy as many bytes as the floor. Peak memory is beyond the inputs, with the results.",
        "",
        "The floor: every input read once, every output written once; scalars per row are not counted.",
        "",
    ]
    ops = {case["op"]: case for case in results["cases"]}
    lines += table(
        ["operation", "read", "written", "bytes per element"],
        [
            [name, ", ".join(c["reads"]), ", ".join(c["writes"]) or "nothing", f"{c['floor_bytes_per_element']}"]
            for name, c in ops.items()
        ],
    )
    for op in ops:
        for shape in SHAPES:
            cases = [c for c in results["cases"] if (c["op"], c["shape"]) == (op, shape)]
            if cases:
                headings = HEADINGS + (GPU_HEADINGS if on_gpu else [])
                lines += ["", f"## {op}, {shape}", "", *table(headings, [_line(c, on_gpu) for c in _in_order(cases)])]
    if results["skipped"]:
        lines += ["", "## Skipped", ""]
        lines += [f"- {reason}: {_summary(names)}" for reason, names in results["skipped"].items()]
    if results["failed"]:
        lines += ["", "## Failed", "", "Wrong results or errors; nothing was measured.", ""]
        lines += ["- " + " ".join(failure.split()) for failure in results["failed"]]
    return "\n".join(lines) + "\n"


def _in_order(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = [*COMPETITORS, "copy"]
    return sorted(cases, key=lambda c: (c["rows"], order.index(c["competitor"])))


def _line(case: dict[str, Any], on_gpu: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    peak = case["peak_extra_bytes"]
    line = [
        str(case["rows"]),
        case["competitor"] + ("" if case["timed_by"] != "events around calls" else " (no graph)"),
        _microseconds(case["median_s"]),
        f"{_microseconds(case['p20_s'])}-{_microseconds(case['p80_s'])}",
        f"{case['bytes_per_s'] / 1e9:.1f}",
        f"{case['share_of_copy']:.0%}",
        number(case["speedup_over_eager"], ".2f"),
        "" if peak is None else f"{peak / 2**20:.2f}",
    ]
    if on_gpu:
        line += [number(case["launches"], "d"), "" if case["host_s"] is None else _microseconds(case["host_s"])]
    return line


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"


def _summary(names: list[str]) -> str:
    """Short, where one competitor was skipped in very many cases."""
    competitors = sorted({name.split(":")[0] for name in names})
    return f"{len(names)} ({', '.join(competitors)})" if len(names) > 4 else "; ".join(names)


def table(headings: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [row(headings), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)]


def device_folder(folder: Path, device: torch.device) -> Path:
    folder = folder / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def save(results: dict[str, Any], folder: Path) -> Path:
    """Writes results.json, results.md and benchmark.png to the device's own folder, and returns that."""
    folder = device_folder(folder, torch.device(results["kind"]))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, folder)
    return folder


def draw(results: dict[str, Any], folder: Path) -> None:
    """Writes results.md and benchmark.png to a folder."""
    (folder / "results.md").write_text(markdown(results))
    if results["cases"]:
        picture(results, folder / "benchmark.png")


def picture(results: dict[str, Any], path: Path) -> None:
    """Two panels of bars: share of the copy bandwidth and speed-up over eager, at the most rows of each shape.

    Variants of an operation are left to the table, where there are operations proper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [case for case in results["cases"] if not case["variant"]] or results["cases"]
    most_rows: dict[tuple[str, str], int] = {}
    for case in drawn:
        key = case["op"], case["shape"]
        most_rows[key] = max(case["rows"], most_rows.get(key, 0))
    groups = sorted(most_rows, key=lambda key: list({c["op"]: 0 for c in drawn}).index(key[0]))
    shown = {(c["op"], c["shape"], c["competitor"]): c for c in drawn if c["rows"] == most_rows[c["op"], c["shape"]]}
    names = [name for name in COMPETITORS if any(key[2] == name for key in shown)]

    # operations apart from one another, with their name above their shapes
    places, labels, titles, y = [], [], [], 0.0
    for index, (op, shape) in enumerate(groups):
        if index == 0 or op != groups[index - 1][0]:
            y += 0.75
            titles.append((y - 0.68, op))
        places.append(y)
        labels.append(f"{shape}, {most_rows[op, shape]} rows")
        y += 1.0
    thickness = 0.86 / len(names)
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.15 * len(names) * y), sharey=True, layout="constrained")
    panels = (
        ("share_of_copy", "share of the measured copy bandwidth", lambda v: f"{v:.0%}", 100),
        ("speedup_over_eager", "times as fast as eager", lambda v: f"{v:.2f}" if v < 10 else f"{v:.1f}", 1),
    )
    for axis, (field, title, label, factor) in zip(axes, panels, strict=True):
        largest = max(c[field] or 0 for c in shown.values() if c["competitor"] in names) * factor
        for rank, name in enumerate(names):
            if name == "eager" and field == "speedup_over_eager":
                continue
            found = [
                (place, shown[(*key, name)][field])
                for place, key in zip(places, groups, strict=True)
                if (*key, name) in shown
            ]
            found = [(place, value) for place, value in found if value is not None]
            heights = [place + (rank - (len(names) - 1) / 2) * thickness for place, _ in found]
            axis.barh(heights, [v * factor for _, v in found], thickness * 0.92, color=COLOURS[name], label=name)
            for height, (_, value) in zip(heights, found, strict=True):
                axis.text(
                    value * factor + 0.01 * largest, height, label(value), va="center", fontsize=7, color="#333333"
                )
        axis.axvline(100 if factor == 100 else 1, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axis.set_xlim(0, max(1.12 * largest, 105 if factor == 100 else 1.1))
        axis.set_title(title + (", %" if factor == 100 else ""), fontsize=11)
        axis.set_yticks(places, labels, fontsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    for place, op in titles:
        axes[0].text(0.3, place, op, fontsize=9, fontweight="bold", va="center")
    axes[0].set_ylim(y - 0.4, -0.15)
    threads = "" if results["kind"] == "cuda" else ", one thread"
    figure.suptitle(
        f"{results['device']}{threads}: {results['model_output_dtype']} outputs, {results['latent_dtype']} latents, "
        f"torch {results['torch']}",
        fontsize=11,
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(path.parent for path in RESULTS.glob("*/results.json"))):
        draw(json.loads((path / "results.json").read_text()), path)
        print(f"written: {path}/results.md")
