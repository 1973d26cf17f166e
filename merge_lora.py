"""Adapters into the model they were trained on, or into a folder for Hugging Face's PEFT.

python merge_lora.py --hf-model-path DIR_OR_ID --lora-checkpoint CKPT/iter_NNNNNNN --output OUT            a whole model
python merge_lora.py --hf-model-path DIR_OR_ID --lora-checkpoint CKPT/iter_NNNNNNN --output OUT --as-peft  for PEFT

W + scale * B A is added in fp32 and rounded once.  Needs no GPU and a few hundred MB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nano3.config import UserError

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="merge_lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--hf-model-path",
        metavar="DIR_OR_ID",
        help="gives config.json, tokenizer and the base weights (default for these: where they were in training)",
    )
    p.add_argument("--lora-checkpoint", metavar="DIR", required=True, help="iter_NNNNNNN, or a folder of them")
    p.add_argument("--output", metavar="OUT", required=True, help="folder to write")
    p.add_argument("--pretrained", metavar="DIR", help="the base weights, where they are not in --hf-model-path")
    p.add_argument("--as-peft", action="store_true", help="write the adapters for PEFT instead of a merged model")
    p.add_argument("--dtype", choices=DTYPE_NAMES, help="another dtype; A_log, D, selection bias stay fp32")
    p.add_argument("--cpu", action="store_true", help="accepted; the merge runs on the CPU in any case")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    p.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    p.add_argument("--no-progress", action="store_true", help="draw no bar")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from nano3.convert import Options
    from nano3.convert_jobs import bar
    from nano3.merge import merge_model, write_peft

    workers = min(8, os.cpu_count() or 1)
    options = Options(DTYPE_NAMES.get(args.dtype), None, args.overwrite, args.dry_run, False, workers)
    write = write_peft if args.as_peft else merge_model
    print("comparing the base with the fingerprint in the adapters' recipe, for which all of it is read", flush=True)
    try:
        with bar(args.no_progress or args.dry_run) as meter:
            text = write(args.hf_model_path, args.lora_checkpoint, args.pretrained, Path(args.output), options, meter)
    except UserError as error:
        print(f"merge_lora.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("merge_lora.py: stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
        return 130
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
