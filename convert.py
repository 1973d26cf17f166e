"""Nemotron weights in and out, and proof that they are the same.

python convert.py import  --hf-model DIR_OR_ID --megatron-path OUT                 a checkpoint to train from
python convert.py export  --hf-model DIR_OR_ID --megatron-path CKPT --hf-path OUT  a Hugging Face folder again
python convert.py verify  A B                                                      two of any kind, bit by bit
python convert.py compare --hf-model DIR --checkpoint CKPT --prompt TEXT           our logits against transformers'
python convert.py inspect PATH                                                     what it is

Needs no GPU and a few hundred MB of memory, except `compare`, which runs the model.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from nano3.config import UserError

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="import|export|verify|compare|inspect")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text, description=text)
        c.add_argument("--hf-revision", "--revision", metavar="REV", help="branch, tag or commit of a hub id")
        c.add_argument("--drop-mtp", action="store_true", help="leave out mtp.*, the head that predicts further tokens")
        return c

    for name, text in [
        ("import", "Make a checkpoint of a Hugging Face model."),
        ("export", "Make a Hugging Face model of a checkpoint."),
    ]:
        c = command(name, text)
        c.add_argument(
            "--hf-model",
            metavar="DIR_OR_ID",
            required=name == "import",
            help="a folder, or an id of the hub"
            + (
                ""
                if name == "import"
                else "; gives dtypes, config.json, tokenizer (default: what the import kept, if any)"
            ),
        )
        c.add_argument("--megatron-path", "--checkpoint", metavar="DIR", required=True, help="the checkpoint")
        if name == "export":
            c.add_argument("--hf-path", metavar="OUT", required=True, help="folder to write")
        c.add_argument(
            "--dtype", "--torch-dtype", choices=DTYPE_NAMES, help="another dtype; A_log, D, selection bias stay fp32"
        )
        c.add_argument("--max-shard-size", type=size, metavar="SIZE", help="of a file, e.g. 500MB or 5GB")
        c.add_argument("--overwrite", action="store_true", help="replace what is there")
        c.add_argument(
            "--dry-run",
            action="store_true",
            help="check names, shapes, place, free space; write nothing",
        )
        c.add_argument("--workers", type=int, metavar="N", help="files at once (default: one per core, at most 8)")
        c.add_argument("--no-progress", action="store_true", help="draw no bar")
        c.add_argument("--trust-remote-code", action="store_true", help="accepted; not needed, no such code is run")
    c = command("verify", "Compare two checkpoints or models, bit by bit; status 0 if they are the same, 1 if not.")
    c.add_argument("a", metavar="A")
    c.add_argument("b", metavar="B")
    c.add_argument("--workers", type=int, metavar="N")
    c.add_argument("--rounded", action="store_true", help="B is an export: where narrower, A's numbers rounded once")
    c.add_argument("--max-report", type=int, default=10, metavar="N", help="differences to print (default: 10)")
    c = command("inspect", "Say what a folder holds; status 1 if tensors are missing or unexpected.")
    c.add_argument("path", metavar="PATH")
    c = command("compare", "Run both programs on the same tokens: logits error, KL, same first choice.")
    c.add_argument("--hf-model", metavar="DIR_OR_ID", required=True, help="for transformers")
    c.add_argument("--checkpoint", "--megatron-path", metavar="PATH", help="for nano3 (default: the same folder)")
    c.add_argument("--prompt", action="append", required=True, help="text, or ids if there is no tokenizer; repeatable")
    c.add_argument("--tokenizer-model", metavar="PATH", help="default: the tokenizer in --hf-model, else bare ids")
    c.add_argument("--dtype", "--torch-dtype", choices=DTYPE_NAMES, default="float32")
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    c.add_argument("--trust-remote-code", action="store_true", help="accepted; not needed, no such code is run")
    return p


def size(text: str) -> int:
    """Bytes: a number with KB, MB, GB (powers of 1000) or KiB, MiB, GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return max(1, int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if getattr(args, "trust_remote_code", False):
        print("--trust-remote-code is not needed: no code from a model's folder is ever run")
    try:
        return COMMANDS[args.command](args)
    except UserError as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert.py: stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
        return 130


def convert(args: argparse.Namespace) -> int:
    from nano3.convert import Options, export_model, import_model
    from nano3.convert_jobs import bar
    from nano3.hf import find_model

    dtype = DTYPE_NAMES.get(args.dtype)
    options = Options(dtype, args.max_shard_size, args.overwrite, args.dry_run, args.drop_mtp, workers_of(args.workers))
    model = None if args.hf_model is None else find_model(args.hf_model, args.hf_revision)
    with bar(args.no_progress or args.dry_run) as meter:
        if args.command == "import":
            text = import_model(model, Path(args.megatron_path), options, meter)
        else:
            text = export_model(model, args.megatron_path, Path(args.hf_path), options, meter)
    print(text)
    return 0


def verify(args: argparse.Namespace) -> int:
    from nano3.compare import open_any, verify
    from nano3.convert_jobs import bar

    a, b = (
        open_any(path, strict=False, drop_mtp=args.drop_mtp, revision=args.hf_revision) for path in (args.a, args.b)
    )
    for letter, source in (("A", a), ("B", b)):
        print(f"{letter}  {source.folder}: {source.about}")
    with bar(False) as meter:
        found = verify(a, b, workers_of(args.workers), meter, args.rounded)
    for line in found.differences[: args.max_report]:
        print(line)
    if (rest := len(found.differences) - args.max_report) > 0:
        print(f"and {rest:,} more")
    print(found)
    return 0 if found.identical else 1


def inspect(args: argparse.Namespace) -> int:
    from nano3.compare import inspect, open_any

    source = open_any(args.path, strict=False, drop_mtp=args.drop_mtp, revision=args.hf_revision)
    print(inspect(source))
    return 1 if source.problems else 0


def compare(args: argparse.Namespace) -> int:
    from nano3.compare import compare, open_any
    from nano3.data.tokenizer import load_tokenizer
    from nano3.hf import find_model
    from nano3.parallel.mesh import pick_device
    from nano3.train.storage import DTYPES

    model = find_model(args.hf_model, args.hf_revision)
    source = open_any(args.checkpoint or str(model), drop_mtp=args.drop_mtp, setting="--checkpoint")
    has_one = any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(args.tokenizer_model or (str(model) if has_one else "none"), source.config.vocab_size)
    prompts = [tokenizer.encode(text) for text in args.prompt]
    if not all(prompts):
        raise UserError("--prompt: a prompt without tokens cannot be compared; write some text")
    print(f"{sum(map(len, prompts)):,} tokens, {args.dtype}")
    device = pick_device(args.device, setting="--device ")
    for line in compare(source, model, prompts, DTYPES[DTYPE_NAMES[args.dtype]], device):
        print(line)
    print(
        "Floor off is the same computation twice: expect a relative error of 1e-7 to 1e-5 in float32, 1e-2 in bf16. "
        "Floor on is transformers as it comes, with dt held at or above time_step_min in its prefill: not an error of "
        "the weights."
    )
    return 0


def workers_of(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UserError(f"--workers {asked} must be at least 1")
    return asked or min(8, os.cpu_count() or 1)


COMMANDS = {"import": convert, "export": convert, "verify": verify, "inspect": inspect, "compare": compare}

if __name__ == "__main__":
    sys.exit(main())
