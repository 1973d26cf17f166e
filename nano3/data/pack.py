"""Pack supervised samples once, for many runs: `python -m nano3.data.pack --output FOLDER --mode finetune …`.

Takes the settings of a training command; `dataset.packed_path=FOLDER` in place of the data then trains on the result.
The rows are those that --packed-sequence makes on the fly.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nano3.config import UserError
from nano3.data.packing import efficiency, packed_files, write_packed


def main(argv: list[str] | None = None) -> int:
    # The command line sits above the library: settings are not this file's business.
    from nano3.cli import parser, resolve
    from nano3.data.corpus import is_supervised, open_tokenizer, pack_samples
    from nano3.train.checkpoint import choose_tokenizer

    p = parser()
    p.prog, p.description = "pack", "Pack supervised samples into Parquet files, for dataset.packed_path."
    p.add_argument("--output", required=True, metavar="FOLDER", help="gets training.parquet and validation.parquet")
    args = p.parse_args(argv)
    try:
        config, _ = resolve(args)
        if config.dataset.packed_path is not None or not is_supervised(config):
            raise UserError("pack needs supervised data: --mode finetune with dataset.path or dataset.name")
        choose_tokenizer(config, config.checkpoint.load or config.checkpoint.pretrained_checkpoint)
        config.dataset.packed_sequence = True
        tokenizer = open_tokenizer(config)
        splits, about = pack_samples(config, tokenizer)
        print("\n".join(about))
        for split, path in packed_files(Path(args.output)).items():
            if split in splits:
                rows, size = splits[split], config.dataset.seq_length
                write_packed(path, rows, size, config.tokenizer.tokenizer_model)
                print(f"{path}: {len(rows):,} rows of {size:,} tokens, {efficiency(rows, size):.1%} of them real")
            elif path.exists():  # of an earlier call: it may hold what is trained on now
                path.unlink()
                print(f"{path}: removed, since validation.eval_iters=0 asks for no validation rows")
    except (UserError, OSError) as error:
        print(f"pack: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
