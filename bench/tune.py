"""Sweeps the launch settings of the two main kernels on the GPU at hand, for whoever edits kernels/launch.py.

    python -m bench.tune [--seconds 45] [--output tune.json]

Each setting's results are checked before it is timed. Nothing is chosen here: the launch table is edited by hand.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.cases import SHAPES, default_device, make_inputs
from bench.measure import copy_bandwidth, take_turns
from bench.test_policy_loss import GRADIENT
from bench.test_sampler_step import DRAWN

BLOCKS = (1024, 2048, 4096, 8192)
WARPS = (4, 8, 16)
ROWS = {"SD 1.5 512px": 256, "FLUX 1024px": 32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="time after which no further setting is tried")
    parser.add_argument("--output", type=Path, help="where to write the list as JSON")
    arguments = parser.parse_args()
    device = default_device()
    if device.type != "cuda":
        print("skipped: launch settings can be timed on a GPU only")
        return 0
    from pcpo_fast.kernels import launch

    deadline = time.perf_counter() + arguments.seconds
    shipped = launch.TABLE
    bandwidth = copy_bandwidth(device)
    found = []
    for shape, rows in ROWS.items():
        slots = [make_inputs(rows, SHAPES[shape], device, seed=0)]
        slots += [slots[0].copy() for _ in range(2)]
        for op in (GRADIENT, DRAWN):
            settings = [None] + [(block, warps) for block in BLOCKS for warps in WARPS if block >= 64 * warps]
            for setting in settings:
                if time.perf_counter() > deadline:
                    print("out of time")
                    break
                launch.TABLE = shipped if setting is None else (launch.Launch(None, *setting),)
                line = {"op": op.name, "shape": shape, "rows": rows}
                line |= dict(zip(("block", "num_warps"), setting or ("shipped", "shipped"), strict=True))
                try:
                    op.check(slots[0], op.ours(slots[0], "triton"), "ours-triton")
                    times = take_turns({"ours": lambda i, op=op: op.ours(i, "triton")}, slots, 0.2)["ours"]
                except Exception as error:
                    line["failed"] = " ".join(str(error).split())[:200]
                else:
                    line["median_s"] = statistics.median(times.seconds)
                    line["share_of_copy"] = op.bytes(slots[0]) / line["median_s"] / bandwidth
                found.append(line)
                print(json.dumps(line))
    launch.TABLE = shipped
    if arguments.output:
        arguments.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "settings": found}, indent=1))
    return int(any("failed" in line for line in found))


if __name__ == "__main__":
    sys.exit(main())
