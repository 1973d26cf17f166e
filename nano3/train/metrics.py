"""What a person sees and a file keeps: a live line on a terminal, one line a step elsewhere, JSON lines always."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nano3.config import Config, UserError


class Log:
    """Console, DIR/metrics.jsonl, and TensorBoard or Weights & Biases when asked for.  Only the first rank speaks."""

    def __init__(self, config: Config, folder: Path, total: int, main: bool) -> None:
        self.main, self.total, self.config = main, total, config
        self.console = Console(highlight=False, soft_wrap=True)
        self.file = self.progress = self.board = self.wandb = None
        if not main:
            return
        try:
            self.file = os.open(path := folder / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            with path.open("rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
                self.torn = f.read(1) not in (b"", b"\n")  # the last line, by a kill
        except OSError as error:
            raise UserError(f"logger.run_dir={folder}: metrics.jsonl cannot be written to: {error}") from None
        self.lost = 0  # lines that could not be written
        if config.logger.tensorboard_dir:
            self.board = _tensorboard(config.logger.tensorboard_dir)
        if config.logger.wandb_project:
            self.wandb = _wandb(config)
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("training", total=total, loss="-", lr="-", speed="-")
            self.progress.start()

    def say(self, text: str = "") -> None:
        if self.main:
            self.console.print(text, markup=False)

    def step(self, iteration: int, row: dict[str, Any], left: float) -> None:
        """One optimizer step.  `left`: seconds to the end at the present speed."""
        self.record("train", iteration, row)
        if not self.main:
            return
        line = (
            f"step {iteration:>{len(str(self.total))}}/{self.total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"grad norm {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tokens/s"
        )
        if "tflops" in row:
            line += f"  {row['tflops']:.1f} TFLOP/s" + (f" ({row['mfu']:.0%} MFU)" if "mfu" in row else "")
        if "memory_gib" in row:
            line += f"  {row['memory_gib']:.1f} GiB"
        if "balance" in row:
            line += f"  balance {row['balance']:.2f}"
        line += f"  {clock(left)} left"
        if self.progress is None:
            self.say(line)
            return
        self.progress.update(
            self.task,
            completed=iteration,
            loss=f"{row['loss']:.4f}",
            lr=f"{row['lr']:.1e}",
            speed=f"{row['tokens_per_second']:,.0f}",
        )
        if iteration % self.config.logger.log_interval == 0:
            self.say(line)

    def record(self, kind: str, iteration: int, row: dict[str, Any]) -> None:
        if not self.main:
            return
        self._write(json.dumps({"kind": kind, "iteration": iteration, "time": time.time(), **row}) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, iteration)
        if self.wandb is not None:
            self.wandb.log(numbers, step=iteration)

    def _write(self, line: str) -> None:
        """A log that cannot be written is no reason to end a run: checkpoints may lie on another disk."""
        try:
            raw = b"\n" * self.torn + line.encode()
            written = os.write(self.file, raw)
            self.torn = written < len(raw)
            if self.torn:
                raise OSError("the disk took a part of a line")
            if self.lost:
                self.say(f"metrics.jsonl can be written to again; {self.lost} lines are missing")
            self.lost = 0
        except OSError as error:
            if not self.lost:
                self.say(f"warning: metrics.jsonl cannot be written to: {error}; training goes on")
            self.lost += 1

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.file is not None:
            os.close(self.file)


def clock(seconds: float) -> str:
    """65 -> '1:05', 3700 -> '1:01:40'."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def _tensorboard(folder: str):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            f"logger.tensorboard_dir={folder} needs the tensorboard package: pip install 'nano3[tensorboard]'"
        ) from None
    return SummaryWriter(folder)


def _wandb(config: Config):
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"logger.wandb_project={config.logger.wandb_project} needs the wandb package: pip install 'nano3[wandb]'"
        ) from None
    from omegaconf import OmegaConf

    g = config.logger
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    return wandb.init(project=g.wandb_project, entity=g.wandb_entity, name=g.wandb_exp_name, config=plain)
