"""Every operator against its best peer and its floor, in one run on one GPU.

    python -m benchmarks.kernels [--only ssd band moe attention head] [--out kernels.json]

Each table is printed by its own module (`python -m benchmarks.kernels_ssd` and so on, where `--check` compares with
float64 over odd shapes and `--sweep` times every configuration); this one runs them all and keeps the records.
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks import kernels_attention, kernels_band, kernels_head, kernels_moe, kernels_ssd

MODULES = {
    "ssd": kernels_ssd,
    "band": kernels_band,
    "moe": kernels_moe,
    "attention": kernels_attention,
    "head": kernels_head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--out", default="", metavar="JSON", help="write all records there")
    args = parser.parse_args()
    records = []
    for name in args.only:
        sys.argv = [f"benchmarks.kernels_{name}"]  # each module reads its own command line: defaults here
        records += MODULES[name].main()
    if args.out:
        with open(args.out, "w") as f:
            json.dump(records, f, indent=1)


if __name__ == "__main__":
    main()
