"""Data on the CPU: building indices, blending, reading samples, preparing text.  python -m benchmarks.data [--tokens N]

--prepare-mb N times the whole of nano3.data.prepare on N MB instead, start-up included, by the clock and in CPU time.

Prints a table and, as the last line, JSON.  Reading is from the page cache (the file has just been written); preparing
is compared in CPU time with the tokenizer alone on the same documents, so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from nano3.config import DatasetConfig
from nano3.data.blend import BLOCK, Blend, load_blend
from nano3.data.indexed import IndexedDataset, IndexedWriter
from nano3.data.loader import Place, stream
from nano3.data.prepare import Job, convert
from nano3.data.sampling import Cache, Samples
from nano3.data.sources import Piece, Read
from nano3.data.tokenizer import HuggingFaceTokenizer

SECONDS = 2.0  # spent on each reading rate


def write_file(prefix: Path, tokens: int) -> IndexedDataset:
    """Documents of 500 ids on average, as long as the web's are: most short, a few very long."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, "uint16") as w:
        while w.ids < tokens:
            w.add(rng.integers(0, 50_000, int(rng.exponential(500)) + 1, dtype=np.uint16))
    return IndexedDataset(prefix)


def seconds(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def sampling_records(folder: Path, tokens: int) -> list[dict]:
    data, out = write_file(folder / "data", tokens), []
    out.append({"op": "open and check", "shape": f"{tokens:,} ids", "s": seconds(lambda: IndexedDataset(data.prefix))})
    for S in (128, 2048, 8192):
        fresh, again = (Samples(data, (0, data.documents), S, 1, Cache(folder / "cache"), 50_000) for _ in range(2))
        shape = f"{tokens:,} ids, S={S}"
        out.append({"op": "build indices", "shape": shape, "s": seconds(lambda s=fresh: s.sample(0))})
        out.append({"op": "load indices", "shape": shape, "s": seconds(lambda s=again: s.sample(0))})
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            again.sample(n)
            n += 1
        out.append({"op": "read samples", "shape": shape, "tokens/s": n * S / (time.perf_counter() - start)})
    return out


def loading_record(folder: Path, seq_length: int, rows: int = 8) -> dict:
    """What the training loop asks for: batches with the boundaries of their documents, in one process."""
    config = DatasetConfig(blend=str(folder / "data"), seq_length=seq_length, path_to_cache=str(folder / "cache"))
    batches = stream(load_blend(config, 1, 50_000, valid=False), "train", 0, Place(rows, rows))
    next(batches)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(batches)
        n += rows * seq_length
    rate = n / (time.perf_counter() - start)
    return {"op": "load batches", "shape": f"{rows} rows of {seq_length:,}", "tokens/s": rate}


def blend_records(folder: Path) -> list[dict]:
    out = []
    for k in (2, 16, 64, 256):
        blend = Blend(np.random.default_rng(k).dirichlet(np.ones(k)).tolist(), Cache(folder / "blend"))
        out.append(
            {
                "op": "order a blend",
                "shape": f"{k} sources, {BLOCK:,} samples",
                "s": seconds(lambda b=blend: b.locate(0)),
            }
        )
    return out


def source_texts(folder: Path) -> list[str]:
    """Python's own source text in pieces, and a byte-pair vocabulary learnt from a part of it: tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts][:600]
    texts = [part for p in files for part in p.read_text(errors="ignore").split("\n\n\n") if part.strip()]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["</s>"], show_progress=False)
    inner.train_from_iterator(texts[:1500], trainer)
    inner.save(str(folder / "tokenizer.json"))
    return texts


def prepare_records(folder: Path) -> list[dict]:
    """One process."""
    texts = source_texts(folder)
    tokenizer = HuggingFaceTokenizer(str(folder / "tokenizer.json"))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    job = Job(str(folder / "out"), "", Read(), True, "99,1", False)
    job.record(0).parent.mkdir()
    size = sum(len(t.encode()) for t in texts) / 1e6
    alone, whole = [], []
    for _ in range(3):
        start = time.process_time()
        for t in texts:
            tokenizer.encode(t)
        alone.append(time.process_time() - start)
        start = time.process_time()
        convert(job, 0, Piece("jsonl", str(folder / "text.jsonl")), tokenizer)
        whole.append(time.process_time() - start)
    return [
        {
            "op": "prepare JSONL",
            "shape": f"{size:.0f} MB, 1 process",
            "MB/s": size / min(whole),
            "of_tokenizer_alone": min(alone) / min(whole),
        }
    ]


def encode_share(path: str, number: int, workers: int) -> tuple[float, float, float]:
    """Encode every `workers`-th line of a JSONL file.  Returns when it began and ended, and the CPU time."""
    tokenizer = HuggingFaceTokenizer(str(Path(path).with_name("tokenizer.json")))
    with open(path) as f:
        texts = [json.loads(line)["text"] for i, line in enumerate(f) if i % workers == number]
    begin, spent = time.time(), time.process_time()
    for text in texts:
        tokenizer.encode(text)
    return begin, time.time(), time.process_time() - spent


def large_record(folder: Path, megabytes: int, workers: int) -> dict:
    """The whole program on a large file, start-up included, against the tokenizer alone in as many processes."""
    texts, path = source_texts(folder), folder / "text.jsonl"
    size = count = 0
    with path.open("w") as f:
        while size < megabytes * 1e6:
            text = f"# {count}\n{texts[count % len(texts)]}"
            f.write(json.dumps({"text": text}) + "\n")
            size, count = size + len(text.encode()), count + 1
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        found = pool.starmap(encode_share, [(str(path), i, workers) for i in range(workers)])
    alone = max(end for _, end, _ in found) - min(begin for begin, _, _ in found)
    command = [sys.executable, "-m", "nano3.data.prepare", "--input", str(path), "--output-prefix", str(folder / "o/x")]
    command += ["--tokenizer-model", str(folder / "tokenizer.json"), "--append-eod", "--workers", str(workers)]
    start, before = time.time(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole, after = time.time() - start, os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {
        "op": "prepare JSONL",
        "shape": f"{size / 1e6:.0f} MB, {workers} workers",
        "MB/s": size / 1e6 / whole,
        "of_tokenizer_alone": alone / whole,
        "of_its_cpu_time": sum(spent for *_, spent in found) / cpu,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=100_000_000)
    p.add_argument("--prepare-mb", type=int, default=0, help="only nano3.data.prepare, on a file of this size")
    p.add_argument("--workers", type=int, default=2, help="of it")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.prepare_mb:
            print(json.dumps(large_record(folder, args.prepare_mb, args.workers)))
            return
        records = sampling_records(folder, args.tokens)
        records += [loading_record(folder, seq_length) for seq_length in (128, 2048, 8192)]
        records += blend_records(folder) + prepare_records(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    for r in records:
        rates = ", ".join(
            f"{v:,.3f} {k}" if v < 100 else f"{v:,.0f} {k}" for k, v in r.items() if k not in ("op", "shape")
        )
        print(f"{r['op']:16} {r['shape']:36} {rates}")
    print(f"peak memory {peak:,.0f} MB (mapped pages of the files included)")
    print(json.dumps([{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in records]))


if __name__ == "__main__":
    main()
