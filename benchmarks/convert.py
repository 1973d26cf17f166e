"""How fast and in how much memory `convert.py` moves the 30B geometry, against `cp` of the same files.

    python -m benchmarks.convert --folder /big/disk              all 52 layers: 63 GB, 190 GB of disk at the peak
    python -m benchmarks.convert --folder /big/disk --layers 3   the first three and the vocabulary at full width

Makes random weights in the released layout (names, shapes, dtypes, shards), times cp, import and export of them, checks
with `verify` that every bit arrived, and kills both commands half-way to see that the second run writes only what was
missing.  Memory is that of the process without the file's pages (RssAnon) and with them (VmHWM).  The page cache is as
the step before leaves it, for cp as for us, and cp runs before and after us: its rate is that of both together, and we
are compared with the faster of the two as well, for which the files lie in memory more often (what we write does not
stay there).  Our time includes the flush to disk, cp's is given with and without one.
Prints a table and one JSON line; deletes what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nano3.config import ModelConfig
from nano3.convert import in_files
from nano3.hf import FP32, GEOMETRY, is_experts, released_name, shapes
from nano3.hf_files import INDEX, Target, write_safetensors

ROOT = Path(__file__).parent.parent


def make(folder: Path, c: ModelConfig, shard: int, pools: dict[str, memoryview] | None = None) -> int:
    """A released folder of random bits, or of bytes from a pool for each dtype.  Returns its bytes."""
    folder.mkdir(parents=True)
    bits = memoryview(np.random.default_rng(0).bytes(64 << 20))

    def data(pool: memoryview, seed: int, count: int) -> Iterator[memoryview]:
        at = 4 * seed * 7919 % (len(pool) // 2)
        while count:
            n = min(count, len(pool) - at)
            yield pool[at : at + n]
            count, at = count - n, 0

    targets = []
    for name, shape in shapes(c).items():
        dtype = "F32" if name.rsplit(".", 1)[-1] in FP32 else "BF16"
        for e in range(shape[0]) if is_experts(name) else [None]:
            t = Target(released_name(name, e), dtype, shape if e is None else shape[1:], list)
            pool = pools[dtype] if pools else bits
            targets.append(t._replace(data=partial(data, pool, len(targets), t.bytes)))
    groups = in_files(targets, lambda t: t.bytes, shard)
    index = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / file, group, lambda n: None)
        index |= {t.name: file for t in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {f: getattr(c, f) for f in GEOMETRY if f != "time_step_limit"}
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h", "torch_dtype": "bfloat16", **config}))
    return sum(t.bytes for t in targets)


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of cp, and of cp and flush."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    copied = time.perf_counter() - start
    subprocess.run(["sync", *target.glob("*.safetensors")], check=True)
    flushed = time.perf_counter() - start
    shutil.rmtree(target)
    return copied, flushed


def finished(journal: Path) -> int:
    """The bytes of the files that a journal calls finished."""
    try:
        lines = journal.read_text().splitlines()
        return sum(json.loads(line).get("record", [0])[0] for line in lines if line.endswith("}"))
    except OSError:
        return 0


def convert(*args: str | Path, stop_at: tuple[Path, float] | None = None) -> dict[str, float]:
    """Run convert.py; memory in bytes, seconds in all and as it says itself.  stop_at: a journal, and the number of
    finished bytes in it at which the process is killed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, ROOT / "convert.py", *args], stdout=subprocess.PIPE, env=env, text=True)
    peak = {"RssAnon": 0, "VmHWM": 0}
    while p.poll() is None:
        try:
            status = Path(f"/proc/{p.pid}/status").read_text()
        except OSError:
            break
        for key in peak:
            if match := re.search(rf"{key}:\s+(\d+) kB", status):
                peak[key] = max(peak[key], int(match[1]) * 1024)
        if stop_at is not None and finished(stop_at[0]) >= stop_at[1]:
            p.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    text = p.communicate()[0]
    if p.returncode != (0 if stop_at is None else -signal.SIGKILL):
        raise SystemExit(f"convert.py {' '.join(map(str, args))} ended with {p.returncode}: {text}")
    said = re.search(r"([\d,]+) bytes written in ([\d.]+) s", text)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": int(said[1].replace(",", "")) if said else 0,
        "moving": float(said[2]) if said else 0.0,
        **peak,
    }


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__.split("\n\n")[0])
    p.add_argument("--folder", required=True, type=Path, help="for the files; something new is made in it")
    p.add_argument("--layers", type=int, default=52)
    p.add_argument("--shard", type=float, default=5.0, help="GB of a file")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = p.parse_args()
    whole = ModelConfig()
    c = replace(whole, hybrid_override_pattern=whole.hybrid_override_pattern[: args.layers])
    home = args.folder / "convert_benchmark"
    hf, ckpt, out, again = (home / n for n in ("hf", "ckpt", "out", "copy"))
    home.mkdir(parents=True)
    try:
        size = make(hf, c, int(args.shard * 1e9))
        print(f"{c.hybrid_override_pattern}: {size:,} bytes, {args.workers} workers", flush=True)
        shard = ["--max-shard-size", f"{args.shard}GB", "--workers", str(args.workers)]
        imports = ["import", "--hf-model", hf, "--megatron-path", ckpt, *shard]
        exports = ["export", "--hf-model", hf, "--megatron-path", ckpt, "--hf-path", out, *shard]
        record: dict[str, object] = {"pattern": c.hybrid_override_pattern, "bytes": size, "workers": args.workers}
        for command, files in ((imports, hf), (exports, ckpt / "iter_0000000")):
            before = copy(files, again)
            ours = convert(*command)
            report(record, command[0], size, [before, copy(files, again)], ours)
        convert("verify", hf, ckpt)
        convert("verify", hf, out)
        print("verify: identical to the bit, both ways", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(ckpt)
        journals = {"import": ckpt / ".incomplete_iter_0000000.journal", "export": out / ".incomplete.journal"}
        for command, files in ((imports, ckpt / "iter_0000000"), (exports, out)):
            convert(*command, stop_at=(journals[command[0]], size / 2))
            second = convert(*command)
            print(f"{command[0]} killed half-way: the second run wrote {second['bytes'] / size:.0%}", flush=True)
            record[f"{command[0]}_second_run"] = second["bytes"] / size
            convert("verify", hf, files)
        print(json.dumps(record))
    finally:
        shutil.rmtree(home)


def report(
    record: dict[str, object], name: str, size: int, copies: list[tuple[float, float]], ours: dict[str, float]
) -> None:
    copied, flushed = (sum(seconds) / len(copies) for seconds in zip(*copies, strict=True))
    rates = {
        "cp": size / copied / 1e9,
        "cp_faster": size / min(seconds for seconds, _ in copies) / 1e9,
        "cp_and_flush": size / flushed / 1e9,
        "ours": size / ours["moving"] / 1e9,
    }
    cp, faster = (f"{rates['ours'] / rates[kind]:.0%}" for kind in ("cp", "cp_faster"))
    print(
        f"{name}: {rates['ours']:.2f} GB/s ({ours['seconds']:.1f} s with start-up), cp {rates['cp']:.2f}, its faster "
        f"run {rates['cp_faster']:.2f}, cp and flush {rates['cp_and_flush']:.2f}: {cp} of cp, {faster} of its faster "
        f"run; memory {ours['RssAnon'] / 1e9:.2f} GB, with the files' pages {ours['VmHWM'] / 1e9:.2f} GB",
        flush=True,
    )
    record[name] = {**rates, "RssAnon": ours["RssAnon"], "VmHWM": ours["VmHWM"]}


if __name__ == "__main__":
    main()
