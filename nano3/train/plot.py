"""Draw the losses of one or more runs: python -m nano3.train.plot runs/tiny [runs/other …] [--out loss.png]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m nano3.train.plot", description="Draw training and validation loss.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, each with a metrics.jsonl")
    p.add_argument("--out", default="loss.png", metavar="PNG")
    args = p.parse_args()
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("plot: error: this needs matplotlib: pip install 'nano3[plot]'", file=sys.stderr)
        return 2
    figure, axes = plt.subplots(figsize=(8, 5))
    for run in args.runs:
        file = Path(run) / "metrics.jsonl"
        if not file.is_file():
            print(f"plot: error: {file} is not there; give a run folder such as runs/tiny", file=sys.stderr)
            return 2
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for kind, style in (("train", "-"), ("valid", "o-")):
            points = [(r["iteration"], r["loss"]) for r in rows if r["kind"] == kind]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{run} {kind}", alpha=0.8, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(args.out, dpi=120)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
