"""Which checkpoint a path means, and whether it is whole.

A path is looked up once in a run, by its first rank: while it starts, another run may write a newer checkpoint into the
same folder, and then two ranks, or the tokenizer and the weights, would come from different ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed as dist

from nano3.config import UserError
from nano3.parallel.mesh import ALONE, Mesh, first_says
from nano3.train import storage
from nano3.train.storage import MANIFEST, NEXT, POINTER, Manifest, read_manifest


def is_ours(path: str | Path) -> bool:
    """Whether a path leads to checkpoints of ours, and not to a Hugging Face folder."""
    folders = (Path(path), Path(path) / "checkpoints")
    return any((f / MANIFEST).is_file() or (f / POINTER).is_file() or any(f.glob("iter_*")) for f in folders)


def find(path: str | Path, setting: str) -> Path:
    """The iteration folder meant by `path`: itself, or the newest complete one in it.  `setting` is named in errors.

    That is the one the pointer names, except after a kill between two steps of `commit`: the checkpoint has its name,
    but the pointer is one behind (NEXT names it), or an older one of the same name was moved aside for it.  Times of
    files decide nothing, so a copy of the folder is as good as the folder.
    """
    folder = Path(path)
    for candidate in (folder, folder / "checkpoints"):  # a run folder will do as well
        if (candidate / MANIFEST).is_file():
            return candidate
        done = [p for p in storage.iterations(candidate) if (p / MANIFEST).is_file()]
        if (ahead := storage.pointed_to(candidate / NEXT)) in done:
            return ahead
        pointer = candidate / POINTER
        if pointer.is_file():
            chosen = storage.pointed_to(pointer) or candidate
            if chosen in done:
                return chosen
            if (aside := storage.replaced_folder(chosen)).is_dir():
                return aside
            text = pointer.read_bytes()[:20].decode(errors="replace").strip()
            problem = f"{setting}={path}: {POINTER} says {text!r}, but {chosen} is not a checkpoint"
            raise UserError(problem + remedy(candidate, chosen))
        if done:
            return done[-1]
    raise UserError(f"{setting}={path}: no checkpoint there (expected iter_NNNNNNN folders or one of them)")


def fixed(path: str, setting: str, mesh: Mesh = ALONE) -> str:
    """A path that means the same from now on: of checkpoints of ours the iteration; any other as it is."""
    return first_says(mesh, lambda: str(find(path, setting).resolve()) if is_ours(path) else path)


def candidates(path: Path, but: Path | None = None) -> list[Path]:
    """The checkpoints that may serve instead of one that is damaged, the best first.

    Those beyond the one that the pointer names come last: a run went back before them and left them behind.
    """
    inside = [path.parent] if re.fullmatch(r"\.?(replaced_)?iter_[0-9]+", path.name) else [path, path / "checkpoints"]
    folder = next((f for f in inside if storage.iterations(f)), path)
    there = [p for p in reversed(storage.iterations(folder)) if p != but]
    newest = storage.pointed_to(folder / NEXT)
    newest = newest if newest in there else storage.pointed_to(folder / POINTER)
    return there if newest is None else sorted(there, key=lambda p: int(p.name[5:]) > int(newest.name[5:]))


def last_good(path: Path, but: Path | None = None) -> Path | None:
    """The first of the candidates whose files are all as they were written; None if there is none."""
    return next((c for c in candidates(path, but) if not _problem(c, "", ALONE)[0]), None)


def remedy(folder: Path, bad: Path) -> str:
    """The end of a message about a bad checkpoint."""
    good = last_good(folder, bad)
    if good is None:
        return "; there is no good one beside it"
    return f"; the last good one is iteration {int(good.name[5:])}: load {good}, or add --resume-from-last-good"


def open_verified(
    path: str | Path, setting: str, mesh: Mesh = ALONE, or_last_good: bool = False
) -> tuple[Path, Manifest]:
    """The checkpoint meant by `path`, every file's checksums compared, the ranks sharing the work.

    or_last_good: if it is damaged, another that is not.  Raises UserError, which names one if there is.
    """
    try:
        folder = first_says(mesh, lambda: find(path, setting))
        problem, manifest = _problem(folder, setting, mesh)
        problem = problem and problem + first_says(mesh, lambda: "" if or_last_good else remedy(folder, folder))
    except UserError as error:
        folder, problem = Path(path), str(error)
    if not problem:
        return folder, manifest
    for candidate in first_says(mesh, lambda: candidates(folder, folder)) if or_last_good else ():
        bad, manifest = _problem(candidate, setting, mesh)
        if not bad:
            return candidate, manifest
    raise UserError(problem + "; and there is no good one beside it" * or_last_good)


def _problem(folder: Path, setting: str, mesh: Mesh) -> tuple[str, Manifest | None]:
    """What is wrong with a checkpoint, on every rank alike and empty if nothing is, and its manifest."""
    manifest, mine = None, ""
    try:
        manifest = read_manifest(folder, setting)
        storage.verify(folder, manifest, setting, mesh.rank, mesh.world)
    except (UserError, OSError) as error:
        mine = str(error) if isinstance(error, UserError) else f"{setting}: {folder} cannot be read: {error}"
    found = [mine]
    if mesh.host is not None:
        found = [""] * mesh.world
        dist.all_gather_object(found, mine, group=mesh.host)
    return next(filter(None, found), ""), manifest
