"""Text to indexed files and the blend that names them: python -m nano3.data.prepare --input … --output-prefix P …

    python -m nano3.data.prepare --input data/*.jsonl.gz --output-prefix out/web --tokenizer-model PATH \\
        --append-eod --workers 8
    python train.py --mode pretrain --per-split-data-args-path out/web.json --tokenizer-model PATH

Inputs are cut into pieces (sources.py); a worker process turns one piece into one shard of each split,
P-00012_train.bin and .idx, and P.json, written last, lists them with their numbers of ids as weights.  P.parts/ keeps
a record of each finished piece: the same command, run again after a kill, does what is left.

A document's split is decided by a hash of its text, so copies of a document never stand in two splits, and a document
stays in its split when others are added.  The shares of --split therefore hold on average.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nano3.config import UserError
from nano3.data.blend import SPLITS
from nano3.data.indexed import IndexedWriter, token_dtype
from nano3.data.sampling import parse_split
from nano3.data.sources import HUB, Piece, Read, RecordError, cut, documents, find_inputs
from nano3.data.tiktoken_vocab import NVIDIA, TiktokenOptions
from nano3.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from nano3.lock import locked

REPORT_BYTES = 1 << 20  # of text between two messages of a worker
SHOWN = 10  # broken records that are shown; all are counted
PROBE = "Héllo 世界, 12345 tokens\n\tof probe 🙂"  # tokenizers that agree on it and in size are taken for the same


@dataclass(frozen=True)
class Job:
    """What every piece has in common."""

    prefix: str
    tokenizer: str
    read: Read
    append_eod: bool
    split: str
    skip: bool  # broken records: leave them out, or stop
    options: TiktokenOptions = NVIDIA

    def shard(self, number: int, split: str) -> str:
        return f"{self.prefix}-{number:05d}_{split}"

    def record(self, number: int) -> Path:
        """The file that says that a piece is finished."""
        return Path(f"{self.prefix}.parts") / f"{number:05d}.json"


def open_tokenizer(job: Job) -> Tokenizer:
    try:
        return load_tokenizer(job.tokenizer, 2**31, job.options)
    except UserError as error:  # the settings of train.py are flags here
        raise UserError(re.sub(r"tokenizer\.(\w+)", lambda m: _flag(m[1]), str(error))) from None


def _flag(setting: str) -> str:
    return "--tokenizer-" + setting.removeprefix("tokenizer_").replace("_", "-")


def convert(
    job: Job, number: int, piece: Piece, tokenizer: Tokenizer, report: Callable[[int, int], None] = lambda *_: None
) -> dict:
    """Write the shards of one piece; returns and saves their record.

    report: called with (bytes of text, ids) done since the last call.  Raises UserError at a broken record, unless
    job.skip; then nothing of the piece is left behind.
    """
    bounds, total = [], 0
    for share in parse_split(job.split):
        total += share
        bounds.append(int(total * 2**64))
    dtype = token_dtype(tokenizer.vocab_size)
    plain = isinstance(tokenizer, ByteTokenizer)
    record = {"ids": {}, "documents": {}, "bytes": 0, "empty": 0, "broken": 0, "errors": []}
    pending = [0, 0]
    with contextlib.ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        for _, text in documents(piece, job.read):
            if isinstance(text, RecordError):
                if not job.skip:
                    raise UserError(f"{text}; correct it, or leave such records out with --on-error skip")
                record["broken"] += 1
                record["errors"] += [str(text)] * (len(record["errors"]) < SHOWN)
                continue
            if not text:
                record["empty"] += 1
                continue
            raw = text.encode()
            if plain:  # a list of its ids would be slower to convert than to make
                ids = np.frombuffer(raw + b"\0" if job.append_eod else raw, np.uint8)
            else:
                ids = tokenizer.encode(text)
                ids = np.array([*ids, tokenizer.eod] if job.append_eod else ids, dtype=np.int64)
            place = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
            split = next(s for s, bound in zip(SPLITS, bounds, strict=True) if place < bound)
            if split not in writers:
                writers[split] = stack.enter_context(IndexedWriter(job.shard(number, split), dtype))
            writers[split].add(ids)
            record["bytes"] += len(raw)
            pending[0], pending[1] = pending[0] + len(raw), pending[1] + len(ids)
            if pending[0] >= REPORT_BYTES:
                report(*pending)
                pending[:] = 0, 0
        for split, w in writers.items():
            record["ids"][split], record["documents"][split] = w.ids, w.documents
    report(*pending)
    _write_json(job.record(number), record)
    return record


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as f:
        f.write(json.dumps(value, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _finished(job: Job, number: int, width: int) -> dict | None:
    """The record of a piece whose shards are there, or None."""
    try:
        record = json.loads(job.record(number).read_text())
        whole = all(
            Path(f"{job.shard(number, s)}.bin").stat().st_size == n * width
            and Path(f"{job.shard(number, s)}.idx").is_file()
            for s, n in record["ids"].items()
        )
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- processes


def _end_with_parent() -> None:
    """End this worker at once when the command is killed: nobody wants the rest, and a second run may begin."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def work(job: Job, tasks: multiprocessing.Queue, results: multiprocessing.Queue) -> None:
    """A worker: pieces from `tasks` until None; ("progress" | "done" | "failed", …) to `results`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tokenizer = open_tokenizer(job)
        while (task := tasks.get()) is not None:
            results.put(
                ("done", task[0], convert(job, *task, tokenizer, lambda *done: results.put(("progress", *done))))
            )
    except UserError as error:
        results.put(("failed", str(error)))
    except OSError as error:
        results.put(("failed", f"--output-prefix {job.prefix}: cannot be written: {error}"))
    except KeyboardInterrupt:
        pass


class Progress:
    """What has been done and how fast, said every other second."""

    def __init__(self, pieces: int, say: Callable[[str], None]) -> None:
        self.pieces, self.say, self.done, self.size, self.ids = pieces, say, 0, 0, 0
        self.start = self.shown = time.monotonic()

    def add(self, size: int, ids: int, pieces: int = 0) -> None:
        self.size, self.ids, self.done = self.size + size, self.ids + ids, self.done + pieces
        now = time.monotonic()
        if now - self.shown > 2 or self.done == self.pieces:
            self.shown, t = now, max(now - self.start, 1e-9)
            self.say(
                f"{self.done}/{self.pieces} pieces, {self.size / 1e6:,.0f} MB of text, {self.ids:,} tokens; "
                f"{self.size / 1e6 / t:,.2f} MB/s, {self.ids / t:,.0f} tokens/s"
            )


def run_pieces(
    job: Job, pieces: dict[int, Piece], workers: int, tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[int, dict]:
    """Convert every piece, `workers` at a time; returns their records.  Raises UserError; what is finished stays."""
    progress, records = Progress(len(pieces), say), {}
    if workers == 1:
        for number, piece in pieces.items():
            records[number] = convert(job, number, piece, tokenizer, progress.add)
            progress.add(0, 0, 1)
        return records
    context = multiprocessing.get_context("spawn")  # a forked tokenizer may hold locks of threads that are gone
    tasks, results = context.Queue(), context.Queue()
    for task in [*pieces.items(), *[None] * workers]:
        tasks.put(task)
    crew = [context.Process(target=work, args=(job, tasks, results), daemon=True) for _ in range(workers)]
    for p in crew:
        p.start()
    try:
        while len(records) < len(pieces):
            try:
                kind, *rest = results.get(timeout=0.5)
            except queue.Empty:
                if dead := [p for p in crew if p.exitcode not in (None, 0)]:
                    raise UserError(
                        f"a worker ended with code {dead[0].exitcode} (-9 is usually too little memory); run the same "
                        "command again, perhaps with fewer --workers: finished pieces are kept"
                    ) from None
                continue
            if kind == "failed":
                raise UserError(rest[0])
            if kind == "done":
                records[rest[0]] = rest[1]
                progress.add(0, 0, 1)
            else:
                progress.add(*rest)
    finally:
        for p in crew:
            if len(records) < len(pieces):
                p.terminate()
            p.join()
    return records


# --- the command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nano3.data.prepare", description="Text to Megatron .bin/.idx files.")
    p.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help=f"files, folders, patterns, or {HUB}OWNER/NAME"
    )
    p.add_argument("--output-prefix", required=True, metavar="P", help="writes P-00000_train.bin/.idx … and P.json")
    p.add_argument("--tokenizer-model", required=True, metavar="PATH", help="as for train.py")
    for setting, kind, what in (
        ("pattern", str, "how a tiktoken vocabulary cuts text: v1, v2, gpt2, cl100k or o200k"),
        ("num_special_tokens", int, "ids before the first rank of NVIDIA's vocabulary JSON (default: 1000)"),
        ("vocab_size", int, "where the ids of NVIDIA's vocabulary JSON end (default: 131072)"),
    ):
        p.add_argument(
            _flag(setting),
            type=kind,
            default=getattr(NVIDIA, setting),
            metavar="X",
            help=f"tokenizer.{setting}: {what}",
        )
    p.add_argument(_flag("special_tokens"), nargs="+", metavar="X", help="tokenizer.special_tokens: the first of them")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: CPUs)")
    p.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's eod")
    p.add_argument("--json-key", default="text", metavar="NAME", help="key or column of the text (default: text)")
    p.add_argument("--split", default="99,1", metavar="A,B,C", help="shares of train, valid, test (default: 99,1)")
    p.add_argument("--on-error", choices=["fatal", "skip"], default="fatal", help="what a broken record does")
    p.add_argument("--shard-mb", type=int, default=128, metavar="N", help="input per shard, in MB (default: 128)")
    p.add_argument("--dataset-config", metavar="NAME", help=f"configuration of a {HUB} input")
    p.add_argument("--dataset-split", default="train", metavar="NAME", help=f"split of a {HUB} input (default: train)")
    return p


def prepare(args: argparse.Namespace, say: Callable[[str], None] = print) -> Path:
    """Run the command; returns the path of P.json.  Raises UserError."""
    for name in ("workers", "shard_mb"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    try:
        parse_split(args.split)
    except UserError as error:
        raise UserError(str(error).replace("dataset.split=", "--split ")) from None
    prefix = os.path.abspath(args.output_prefix)
    read = Read(args.json_key, args.dataset_config, args.dataset_split)
    given = {k: getattr(args, f"tokenizer_{k}") for k in vars(NVIDIA)}
    options = TiktokenOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    job = Job(prefix, args.tokenizer_model, read, args.append_eod, args.split, args.on_error == "skip", options)
    inputs = find_inputs(args.input)
    try:
        pieces = [p for path in inputs for p in cut(path, args.shard_mb * 1_000_000, read)]
        if not pieces:
            raise UserError(f"--input {' '.join(args.input)}: every file is empty")
        tokenizer = open_tokenizer(job)
        job.record(0).parent.mkdir(parents=True, exist_ok=True)
        busy = f"--output-prefix {prefix}: another run is writing there; wait for it"
        with locked(job.record(0).parent / "lock", busy):
            _same_job(job, tokenizer, inputs, args.shard_mb)
            _remove_temporaries(job)
            width = token_dtype(tokenizer.vocab_size).itemsize
            records = {i: r for i in range(len(pieces)) if (r := _finished(job, i, width))}
            if records:
                say(f"{len(records)} of {len(pieces)} pieces were finished before")
            todo = {i: p for i, p in enumerate(pieces) if i not in records}
            if todo:
                records |= run_pieces(job, todo, min(args.workers, len(todo)), tokenizer, say)
            return _finish(job, [records[i] for i in range(len(pieces))], say)
    except OSError as error:
        raise UserError(
            f"--output-prefix {args.output_prefix}: {error}; check the folder, its space and rights"
        ) from None


def _same_job(job: Job, tokenizer: Tokenizer, inputs: list[str], shard_mb: int) -> None:
    """Write down what makes the pieces, or compare it with what an earlier run wrote."""
    files = {p: [(s := Path(p).stat()).st_size, s.st_mtime_ns] for p in inputs if not p.startswith(HUB)}
    given = [[k, v] for k, v in vars(job.options).items() if v != getattr(NVIDIA, k)]
    key = {
        "version": 1,
        "inputs": {p: files.get(p) for p in inputs},
        "tokenizer": [tokenizer.vocab_size, tokenizer.eod, list(tokenizer.encode(PROBE)), *given],
        "read": asdict(job.read),
        "append_eod": job.append_eod,
        "split": job.split,
        "on_error": job.skip,
        "shard_mb": shard_mb,
    }
    path = job.record(0).with_name("job.json")
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return _write_json(path, key)
    except ValueError:
        before = {}
    if different := [k for k, now in json.loads(json.dumps(key)).items() if before.get(k) != now]:
        raise UserError(
            f"--output-prefix {job.prefix}: holds the work of another command, which differs in "
            f"{', '.join(different)}; choose another prefix, or delete {path.parent} to begin anew"
        )
    return None


def _remove_temporaries(job: Job) -> None:
    """What a killed run was writing."""
    shard = rf"\.{re.escape(Path(job.prefix).name)}-\d+_(train|valid|test)\.(bin|idx)\.\d+\.tmp"
    for folder, pattern in ((Path(job.prefix).parent, shard), (job.record(0).parent, r"\..*\.tmp")):
        for path in folder.iterdir():
            if re.fullmatch(pattern, path.name):
                path.unlink(missing_ok=True)  # a worker of the killed run may be giving it its name just now


def _finish(job: Job, records: list[dict], say: Callable[[str], None]) -> Path:
    """Write P.json and say what there is."""
    blend: dict[str, list[str]] = {}
    for split in SPLITS:
        shards = [(i, r["ids"].get(split, 0)) for i, r in enumerate(records)]
        blend[split] = [word for i, n in shards if n for word in (str(n), job.shard(i, split))]
        count = sum(r["documents"].get(split, 0) for r in records)
        say(f"{split}: {count:,} documents, {sum(n for _, n in shards):,} tokens")
    if empty := sum(r["empty"] for r in records):
        say(f"{empty:,} empty documents were left out")
    if broken := sum(r["broken"] for r in records):
        errors = [e for r in records for e in r["errors"]][:SHOWN]
        say(f"{broken:,} broken records were left out" + "".join(f"\n  {e}" for e in errors))
    if not blend["train"]:
        raise UserError(f"--input: no document is left for training of --split {job.split}")
    path = Path(f"{job.prefix}.json")
    _write_json(path, blend)
    say(f"train with --per-split-data-args-path {path}")
    if not blend["valid"]:
        say("there is no validation text: set validation.eval_iters=0, or give valid a larger share of --split")
    return path


def main() -> None:
    try:
        prepare(parser().parse_args(), lambda text: print(text, flush=True))
    except UserError as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare: stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
