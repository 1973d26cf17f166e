"""The training loop: batches in, optimizer steps out; evaluation, samples, checkpoints and a clean end."""

from __future__ import annotations

import contextlib
import ctypes
import math
import shlex
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kernels._common import INTERPRET, triton
from nano3 import adapters
from nano3.cli import difference
from nano3.config import Config, UserError
from nano3.data.corpus import is_supervised, load_dataset, open_tokenizer
from nano3.data.loader import Place, micro_batches, stream
from nano3.data.row import IGNORE
from nano3.model.generate import generate
from nano3.model.init import allocate, initialise, named_tensors
from nano3.parallel.mesh import LostContact, Mesh, first_says, lost_contact
from nano3.train import checkpoint, locate, storage
from nano3.train.answers import is_squad, score
from nano3.train.checkpoint import Saver
from nano3.train.folders import hold, resume_command, run_folders, write_settings
from nano3.train.metrics import Log, clock
from nano3.train.optim import AdamW
from nano3.train.plan import (
    adapter_table,
    choose_kinds,
    memory_here,
    parameters,
    rank_parts,
    training_flops,
    uses_bf16,
)
from nano3.train.schedule import learning_rate
from nano3.train.step import StepReport, TrainingError, evaluate, training_step
from nano3.train.storage import Progress
from nano3.train.update import check_forms

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0}  # dense bf16, from the data sheets


class Trainer:
    """Everything a run owns.  Built without side effects but memory; `run` does the work."""

    def __init__(self, config: Config, name: str, mesh: Mesh) -> None:
        if config.train.recompute == "auto":
            config = choose_kinds(config, mesh.world, mesh.device.type, least(memory_here(mesh.device.type, 1), mesh))
        self.config, self.name, self.mesh = config, name, mesh
        check_kernels(config, mesh.device)
        micro = config.micro_batch(mesh.dp.size)
        self.place = Place(config.train.global_batch_size, micro, mesh.dp.rank, mesh.dp.size)
        c, self.loaded, self.found = config.checkpoint, None, first_says(mesh, self._found)
        base, setting = c.pretrained_checkpoint, "checkpoint.pretrained_checkpoint"
        base = None if base is None else locate.fixed(base, setting, mesh)
        load = first_says(mesh, self._resumable)
        if load is not None:  # found and verified once, before anything takes memory
            held = locate.open_verified(load, "checkpoint.load", mesh, c.resume_from_last_good)
            self.loaded = held[0]
        checkpoint.choose_tokenizer(config, str(self.loaded or base or "") or None)
        self.tokenizer = open_tokenizer(config)
        if (prompt := config.validation.sample_prompt) is not None and not self.tokenizer.encode(prompt):
            raise UserError(f"validation.sample_prompt={prompt!r} is empty; give a text, or leave it out")
        self.lr = learning_rate(config)
        self.data = load_dataset(config, self.tokenizer)
        dtype = torch.bfloat16 if uses_bf16(config, mesh.device.type) else torch.float32
        check_forms(config.optimizer, dtype == torch.bfloat16, config.parallel.grad_reduce_in_fp32)
        parts = rank_parts(config, mesh.pp.rank)
        model = checkpoint.build(config.model, config.recompute, mesh, parts, config.peft)
        self.model = allocate(model, mesh.device, dtype)
        self.progress = Progress()
        self.recipe = None  # of the adapters, if that is what is trained
        if config.peft.adapts:
            initialise(self.model, config.model, config.rng.seed, adapters_only=True)
        elif self.loaded is None and base is None:
            initialise(self.model, config.model, config.rng.seed)
        self.optimizer = AdamW(self.model, config.optimizer, config.parallel.grad_reduce_in_fp32, config.rng.seed)
        self.optimizer.communication_sms = config.parallel.communication_sms
        if config.peft.adapts:
            self.recipe, self.about_base = adapters.start(config, self.loaded, self.model, self.optimizer)
        if self.loaded is not None:
            self.progress = checkpoint.restore(*held, "checkpoint.load", self.model, self.optimizer)
        elif self.recipe is None and base is not None:
            checkpoint.load_weights(base, "checkpoint.pretrained_checkpoint", self.model, self.optimizer)
        pin = mesh.device.type == "cuda"
        self.batches = stream(self.data, "train", self.progress.samples, self.place, config.dataset.num_workers, pin)
        self.asked_to_stop = False  # this rank; all stop together at the end of a step that has heard of it

    def _resumable(self) -> str | None:
        """checkpoint.load, or None when it is the still empty folder that this run saves to (so a job can restart)."""
        load, save = self.config.checkpoint.load, self.config.checkpoint.save
        held = () if load is None else ("iter_*", storage.replaced_folder(Path("iter_*")).name)
        if load is not None and load == save and not any(p for name in held for p in Path(load).glob(name)):
            return None
        return load

    def _found(self) -> str | None:
        """What checkpoint.load means now, if that is the folder which this run saves to."""
        c, run = self.config.checkpoint, self.config.logger.run_dir
        save = c.save or (run and Path(run) / "checkpoints")
        if not save or c.load is None:
            return None
        if Path(save).resolve() not in (Path(c.load).resolve(), (Path(c.load) / "checkpoints").resolve()):
            return None
        try:
            return str(locate.find(c.load, "checkpoint.load"))
        except UserError:
            return None

    def run(self) -> int:
        """Train to the end or until asked to stop.  Returns the exit status."""
        config, total = self.config, self.config.iterations
        if self.progress.iteration >= total:
            raise UserError(
                f"checkpoint.load={self.loaded}: step {self.progress.iteration} of {total}: nothing is left to do; "
                f"train on with train.train_iters={self.progress.iteration + total}"
            )
        base = config.checkpoint.pretrained_checkpoint if self.recipe is None else self.recipe.base
        folder, self.save_to = run_folders(config, self.name, self.mesh, self.progress.iteration, base)
        with hold(self.save_to, config, self.mesh):
            if first_says(self.mesh, self._found) != self.found:  # while this one waited for the lock
                raise UserError(
                    f"checkpoint.load={config.checkpoint.load}: another run has saved there meanwhile; start again"
                )
            write_settings(folder, config, self.mesh)
            return self._run(folder, Log(config, folder, total, self.mesh.is_main))

    def _run(self, folder: Path, log: Log) -> int:
        config, total = self.config, self.config.iterations
        recipe = {} if self.recipe is None else {checkpoint.RECIPE: self.recipe.to_json()}
        self.saver = Saver(self.save_to, config, self.mesh, recipe)
        self._introduce(log, folder)
        started, spent, trained, last_eval = time.monotonic(), 0.0, 0, None
        if config.validation.eval_iters:
            last_eval = self._evaluate(log)
        handlers = {s: signal.signal(s, self._asked_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            stop = False
            while self.progress.iteration < total and not stop:
                begin = time.monotonic()
                report, lr = self._step()
                spent, trained = spent + time.monotonic() - begin, trained + report.real
                iteration = self.progress.iteration
                left = spent / (iteration - self.first) * (total - iteration)
                log.step(iteration, self._row(report, lr, time.monotonic() - begin), left)
                stop = report.stop
                minutes = config.train.exit_duration_in_mins
                if minutes is not None and time.monotonic() - started >= 60 * minutes:
                    self.asked_to_stop = True  # all ranks hear of it in the next step
                v, every = config.validation, config.checkpoint.save_interval
                ended = iteration == total or stop
                if every >= 0 and (ended or (every and iteration % every == 0)):
                    self._save()  # before anything that may fail
                if v.eval_iters and (iteration == total or (v.eval_interval and iteration % v.eval_interval == 0)):
                    last_eval = self._evaluate(log)
            self.saver.wait()
        except Exception as error:
            if not isinstance(error, LostContact):  # this rank ends, and a save in the background needs all of them
                with contextlib.suppress(Exception):
                    self.saver.wait()
            raise
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            if log.progress is not None:
                log.progress.stop()
        self._summary(log, folder, started, spent, trained, last_eval)
        log.close()
        return 0

    def _step(self) -> tuple[StepReport, float]:
        t, mesh, p = self.config.train, self.mesh, self.progress
        rows = next(self.batches)
        lr = self.lr(p.samples)
        try:
            report = training_step(self.model, self.optimizer, rows, self.config, mesh, lr, self.asked_to_stop)
        except TrainingError as error:
            raise self._diagnosis(str(error)) from None
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            raise self._lost(error) from None
        self.progress = Progress(p.iteration + 1, p.samples + t.global_batch_size, p.tokens + report.tokens)
        return report, lr

    def _diagnosis(self, what: str) -> Exception:
        """The error for a step that was not finite: which tensors were broken before it, and where to go on from."""
        self.saver.wait()
        held = {n: getattr(t, "scales", t) for n, t in named_tensors(self.model).items()}  # codes have no isfinite
        bad = [n for n, t in held.items() if not torch.isfinite(t).all()]
        at = self.progress.iteration
        cause = f"; {len(bad)} tensors hold values that are not finite, the first is {bad[0]}" if bad else ""
        if at == self.first:
            where = f"checkpoint.load={self.loaded}" if self.loaded else f"rng.seed={self.config.rng.seed}"
            return UserError(
                f"{what} before the first step, starting from {where}{cause}; start from another checkpoint"
            )
        resume = f"resume from {self.saver.last} with " if self.saver.last else ""
        return TrainingError(
            f"{what} at step {at + 1}{cause}; {resume}a lower optimizer.lr than {self.config.optimizer.lr:g}"
        )

    def _lost(self, error: RuntimeError) -> Exception:
        saved = f"; go on with checkpoint.load={self.save_to}" if self.saver.last else ""
        return LostContact(
            f"lost contact with another rank in step {self.progress.iteration + 1} "
            f"({str(error).splitlines()[0][:200]}); the rank that failed first is named below{saved}"
        )

    def evaluate(self) -> float:
        """Mean loss per token over the first eval_iters global batches of the validation split, the same every time.

        A small split is read once; its first rows come again where the last batch is not full.
        """
        batch, count = self.place.batch, self.data.count("valid")
        samples = self.config.validation.eval_iters * batch
        firsts = range(0, samples if count is None else min(samples, count), batch)
        rows = (micro_batches(self.data, "valid", first, self.place) for first in firsts)
        return evaluate(self.model, rows, self.config)

    def _evaluate(self, log: Log) -> float:
        loss, at = self.evaluate(), self.progress.iteration
        if not math.isfinite(loss) and at == self.first:
            raise self._diagnosis(f"the validation loss is {loss}")
        sample = at > self.first and self.config.validation.sample_tokens
        text = self._continuation() if sample else None
        row = {"loss": loss, "sample": text}
        log.say(f"validation after step {at}: loss {loss:.6f} nats per token")
        if self.config.validation.answer_samples and at > self.first and is_squad(self.config):
            self.model.eval()
            self.optimizer.finish_gather()
            found = score(self.model, self.data, self.tokenizer, self.config.validation.answer_samples)
            row |= {"exact_match": found.exact, "f1": found.f1}
            log.say(f"{found.questions} questions answered: exact match {found.exact:.1%}, F1 {found.f1:.1%}")
        log.record("valid", at, row)
        if text is not None:
            log.say("\n".join("    | " + line for line in text.splitlines()))
        return loss

    def _continuation(self) -> str:
        v, tokenizer = self.config.validation, self.tokenizer
        ids = v.sample_prompt
        if ids is not None:
            prompt = tokenizer.encode(ids)
        elif self.config.dataset.kind == "embedded":
            prompt = tokenizer.encode("class Reader:\n    def __init__(self, ")
        else:
            row = self.data.row("valid", 0)
            asked = int((row.labels != IGNORE).argmax()) + 1  # a question, up to the first token of its answer
            prompt = row.tokens[: asked if asked > 1 else 8].tolist()
        self.model.eval()
        self.optimizer.finish_gather()
        options = {"temperature": 0.8, "top_p": 0.95, "seed": self.config.rng.seed, "stop_ids": tokenizer.stop_ids}
        return tokenizer.decode([*prompt, *generate(self.model, prompt, v.sample_tokens, **options)])

    def _save(self) -> None:
        self.saver.save(self.model, self.optimizer, self.progress)

    def _asked_to_stop(self, signum: int, _: object) -> None:
        if self.asked_to_stop and signum == signal.SIGINT:  # Ctrl-C twice: at once, then
            raise KeyboardInterrupt  # SIGTERM comes twice by itself: from the job scheduler and from torchrun
        self.asked_to_stop = True

    def _row(self, r: StepReport, lr: float, seconds: float) -> dict[str, object]:
        speed = r.real / seconds
        row = {"loss": r.loss, "lr": lr, "grad_norm": r.grad_norm, "tokens_per_second": speed, "seconds": seconds}
        row |= {"samples": self.progress.samples, "tokens": self.progress.tokens}
        if r.loads:
            row |= {"balance_loss": r.aux, "balance": max(r.loads), "expert_load_max_over_mean": r.loads}
        if self.mesh.device.type == "cuda":
            flops = sum(
                training_flops(self.config.model, self.config.dataset.seq_length, self.config.peft.adapts).values()
            )
            row["tflops"] = flops * speed / self.mesh.world / 1e12
            gpu = torch.cuda.get_device_name()
            if (peak := next((v for k, v in PEAK_TFLOPS.items() if k in gpu), None)) and self.model.dtype.itemsize == 2:
                row["mfu"] = row["tflops"] / peak
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def _introduce(self, log: Log, folder: Path) -> None:
        self.first = self.progress.iteration
        config, n = self.config, parameters(self.config.model)
        precision = str(self.model.dtype).removeprefix("torch.")
        log.say(
            f"nano3 {self.name}: {n.total:,} parameters, {n.active:,} active per token, {precision} on "
            f"{self.mesh.world} x {self.mesh.device.type}"
        )
        changed = difference(config, self.name)
        log.say(f"settings beyond the preset: {' '.join(changed) if changed else 'none'}")
        d = config.dataset
        source = "a blend" if d.kind == "blend" else d.packed_path or d.path or d.name
        log.say(
            f"{config.iterations:,} steps of {config.tokens_per_step:,} tokens from {source}; "
            f"run folder {folder}; Ctrl-C saves and ends"
        )
        for line in self.data.about:
            log.say(line)
        if config.mode == "finetune" and self.loaded is None and config.checkpoint.pretrained_checkpoint is None:
            log.say("checkpoint.pretrained_checkpoint is not set: the weights are random, as for pretraining")
        if self.recipe is not None:
            for line in adapter_table(config, self.model.dtype == torch.bfloat16):
                log.say(line)
            for line in [f"base {self.recipe.base}, fingerprint {self.recipe.fingerprint[:16]}", *self.about_base]:
                log.say(line)
        if self.loaded is not None:
            log.say(f"resumed from {self.loaded} at iteration {self.first}")

    def _summary(
        self, log: Log, folder: Path, started: float, spent: float, trained: int, last_eval: float | None
    ) -> None:
        stopped = self.progress.iteration < self.config.iterations
        wall = time.monotonic() - started
        log.say()
        log.say(
            f"{'stopped' if stopped else 'finished'} at step {self.progress.iteration} of {self.config.iterations}: "
            f"{trained:,} tokens in {clock(wall)} ({clock(spent)} of it training), {trained / spent:,.0f} tokens/s"
        )
        if last_eval is not None and not stopped:
            log.say(
                f"final validation loss {last_eval:.6f} nats per token, perplexity {math.exp(min(last_eval, 80)):.3f}"
            )
        saved = self.saver.last
        log.say(f"  checkpoint  {saved or 'none: checkpoint.save_interval=-1'}")
        log.say(f"  log         {folder / 'metrics.jsonl'}")
        log.say(f"  settings    {folder / 'config.yaml'}")
        if saved is None:
            return
        log.say("next:")
        if stopped:
            settings = folder / "config.yaml"
            log.say(f"  {resume_command(self.config, self.name, settings, self.save_to, self.mesh.world)}")
        if self.recipe is not None:
            base = "" if locate.is_ours(self.recipe.base) else f"--hf-model-path {self.recipe.base} "
            log.say(f"  python merge_lora.py {base}--lora-checkpoint {saved} --output {folder / 'merged'}")
        if is_supervised(self.config):
            row = self.data.row("train", 0)
            asked = int((row.labels != IGNORE).argmax()) + 1
            prompt = shlex.quote(self.tokenizer.decode(row.tokens[:asked].tolist())[-100:])
        else:
            prompt = '"def "' if self.config.dataset.kind == "embedded" else f'"{self.tokenizer.decode([1, 2, 3])}"'
        log.say(f"  python -m nano3.model.generate --checkpoint {self.save_to} --prompt {prompt}")


def least(n: int, mesh: Mesh) -> int:
    """The smallest of all ranks' numbers.  What ranks decide by it they decide alike: a block that is computed again
    sends its messages again, and the others have to answer."""
    box = torch.tensor([n])
    if mesh.host is not None:
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=mesh.host)
    return int(box)


def check_kernels(config: Config, device: torch.device) -> None:
    """Raise UserError if a Triton kernel is asked for, or needed, where none can run."""
    able = INTERPRET or (device.type == "cuda" and triton is not None)
    kernels = vars(config.model.kernels)
    if "conv" in config.recompute:
        if not able:
            raise UserError("train.recompute=conv needs a CUDA device and the triton package; name mamba instead")
        for name in ("conv1d", "ssd", "gated_norm"):
            if kernels[name] == "torch":
                raise UserError(
                    f"train.recompute=conv needs the kernels, but model.kernels.{name}=torch; name mamba in "
                    f"train.recompute instead, or use model.kernels.{name}=auto"
                )
    for name, backend in kernels.items():
        if backend == "triton" and not able:
            raise UserError(
                f"model.kernels.{name}=triton needs a CUDA device and the triton package; use model.kernels.{name}=auto"
            )


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the system.

    By default each tensor above a few hundred kB is mapped, faulted in page by page and unmapped again: a fifth of
    the time of a small model on a CPU.  Does nothing where the C library is another.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20)):
            libc.mallopt(option, value)
