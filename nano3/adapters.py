"""Adapters as files: a checkpoint of ours that holds only what training changed, and `adapter.json` beside it.

The recipe there is everything that is needed to use the adapters: where they are, rank, scale, variant, and which base
they were trained on.  The base is known by a fingerprint of its numbers, whichever files and names they lie in, so
adapters that were trained on an import serve the Hugging Face folder it was made from, and no other model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nano3.config import Config, ModelConfig, PeftConfig, UserError
from nano3.convert import open_checkpoint
from nano3.hf import Source, find_model, open_model
from nano3.model.init import allocate, decoded, named_tensors, store
from nano3.model.layout import pieces
from nano3.model.lora import adapted, scales_of, sites_of
from nano3.model.model import Nano3
from nano3.parallel.mesh import ALONE, Mesh
from nano3.train import checkpoint, locate
from nano3.train.checkpoint import RECIPE
from nano3.train.optim import AdamW
from nano3.train.storage import read_manifest

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """What adapters are and what they belong to."""

    targets: list[str]  # our name of every adapted module, layer by layer
    rank: int
    alpha: float
    scale: float  # what B A is multiplied by
    variant: str  # lora or rslora
    experts: str  # of routed experts: per-expert, shared, none
    router_frozen: bool  # if not, routers were trained in full and lie beside the adapters
    base: str  # folder or hub id that the base was read from
    fingerprint: str  # of the base
    base_dtype: str = "bf16"  # how the base was held in training: as it is, or fp8
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def recipe_of(c: ModelConfig, peft: PeftConfig, base: str, fingerprint: str) -> Recipe:
    targets = [site.module for site in sites_of(c, peft)]
    base = str(Path(base).resolve()) if Path(base).exists() else base
    variant = "rslora" if peft.rslora else "lora"
    frozen = peft.router_frozen
    how = peft.experts, frozen, base, fingerprint, peft.base_dtype
    return Recipe(targets, peft.rank, peft.alpha, peft.scale, variant, *how)


def has_recipe(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def read_recipe(folder: Path, setting: str) -> Recipe:
    """The recipe in an iteration folder.  Raises UserError."""
    path = folder / RECIPE
    try:
        raw = json.loads(path.read_text())
        if raw.get("format") != FORMAT:
            raise UserError(f"{setting}: {path} has format {raw.get('format')}, this nano3 reads {FORMAT}")
        recipe = Recipe(**raw)
    except FileNotFoundError:
        raise UserError(
            f"{setting}: {folder} holds no adapters: {RECIPE} is missing; give the iter_NNNNNNN folder of a LoRA run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{setting}: {path} is damaged") from None
    return recipe


def open_base(path: str, setting: str) -> Source:
    """Base weights: a checkpoint of ours, a Hugging Face folder or a hub id."""
    if locate.is_ours(path):
        return open_checkpoint(path, setting)[0]
    return open_model(find_model(path, setting=setting))


def fingerprint(source: Source, mesh: Mesh = ALONE, workers: int | None = None) -> str:
    """A digest of every number of a model, the same for any form of names and files, and for any number of ranks.

    SHA-256 over the digests of its tensors by our names, each over dtype, shape and elements in order.  Reads all of
    it; the ranks share the work.
    """

    def one(name: str) -> tuple[str, str]:
        t = source.tensors[name]
        digest = hashlib.sha256(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        for block in source.stream(name):
            digest.update(block)
        return name, digest.hexdigest()

    mine = sorted(source.tensors)[mesh.rank :: mesh.world]
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        found = [list(pool.map(one, mine))]
    if mesh.host is not None:
        found *= mesh.world
        dist.all_gather_object(found, found[0], group=mesh.host)
    lines = sorted(f"{name} {digest}\n" for part in found for name, digest in part)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_base(recipe: Recipe, found: str, base: str, setting: str) -> None:
    """Raise UserError if a base is not the one that the adapters were trained on."""
    if recipe.fingerprint != found:
        raise UserError(
            f"{setting}: {base} is not the base of these adapters, which were trained on {recipe.base} (fingerprint "
            f"{recipe.fingerprint[:12]}, found {found[:12]}); give that model, or any copy or conversion of it"
        )


@torch.no_grad()
def load_base(path: str, setting: str, model: Nano3, optimizer: AdamW | None) -> list[str]:
    """Read the base weights of a model with adapters.  Returns lines worth saying about them.

    What is held in FP8 is read, and becomes codes, one matrix after the other (of experts one expert's), so there is
    never more of it in another dtype.  The codes are of the numbers in the files, whatever the model computes in.
    """
    checkpoint.load_weights(path, setting, model, optimizer)
    coded = {n: t for n, t in named_tensors(model).items() if scales_of(t) is not None}
    if not coded:
        return []
    source, sums = open_base(path, setting), {}
    for name, tensor in coded.items():
        error = sums.setdefault(name.split(".mixer.")[1].removesuffix(".weight"), [0.0, 0.0])
        for first in range(tensor.shape[0]) if tensor.ndim == 3 else (0,):
            shape = (1, *tensor.shape[1:]) if tensor.ndim == 3 else tensor.shape
            values = torch.empty(shape, device=tensor.device)
            for piece in pieces(name, values, first, tensor.shape, model):
                piece.tensor.copy_(source.read(name, piece.index))
            rows = slice(first, first + shape[0])
            store(tensor, values, rows)
            for i, t in enumerate((decoded(tensor, rows) - values, values)):
                error[i] += t.norm().item() ** 2
    source.close()
    share = "" if model.mesh.world == 1 else " of this rank's share"
    found = ", ".join(f"{kind} {math.sqrt(e / max(n, 1e-300)):.2%}" for kind, (e, n) in sums.items())
    return [f"base in FP8, error |w' - w| / |w|{share}: {found}"]


def meant(path: str, recipe: Recipe) -> str:
    """The base that a path means beside adapters: a folder of checkpoints, into which a run may go on to save, means
    the one that they were trained on."""
    folders = [Path(path).resolve(), Path(path).resolve() / "checkpoints"]
    return recipe.base if Path(recipe.base).parent in folders and Path(recipe.base).is_dir() else path


def start(config: Config, loaded: Path | None, model: Nano3, optimizer: AdamW | None) -> tuple[Recipe, list[str]]:
    """Bring the base weights of a model with adapters.  loaded: the adapters' iteration folder, if they are resumed.
    Returns the recipe, and lines worth saying about the base.

    Raises UserError if there is no base, or if the adapters there have another recipe or were trained on another base.
    """
    there = None if loaded is None else read_recipe(loaded, "checkpoint.load")
    base, setting = config.checkpoint.pretrained_checkpoint, "checkpoint.pretrained_checkpoint"
    if there is not None:
        setting = setting if base else f"checkpoint.load={loaded}, whose base is"
        base = meant(base, there) if base else there.base
    if base is None:
        raise UserError(
            "--peft lora adapts a model that is trained already: give it with checkpoint.pretrained_checkpoint=PATH"
        )
    base = locate.fixed(base, setting, model.mesh)
    source = open_base(base, setting)
    recipe = recipe_of(config.model, config.peft, base, fingerprint(source, model.mesh))
    source.close()
    if there is not None:
        check_base(there, recipe.fingerprint, base, setting)
        for name in ("targets", "rank", "scale", "experts", "router_frozen", "base_dtype"):
            if getattr(there, name) != getattr(recipe, name):
                raise UserError(
                    f"checkpoint.load={loaded}: its adapters have {name} {getattr(there, name)}, the settings say "
                    f"{getattr(recipe, name)}; use the peft settings it was trained with (config.yaml beside it)"
                )
    return recipe, load_base(base, setting, model, optimizer)


def load_model(path: str, setting: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Nano3, Config]:
    """A model in eval mode from a checkpoint, of the whole model or of adapters, whose base is then read from where it
    was when they were trained.  `dtype` None keeps the one it was trained in."""
    folder = locate.find(path, setting)
    if not has_recipe(folder):
        return checkpoint.load_model(path, setting, device, dtype)
    recipe, config = read_recipe(folder, setting), checkpoint.read_config(folder)
    source = open_base(recipe.base, f"{setting}={path}, whose base is")
    check_base(recipe, fingerprint(source), recipe.base, setting)
    source.close()
    model = checkpoint.build(config.model, mesh=Mesh(device=device), peft=config.peft)
    entries = read_manifest(folder, setting).tensors
    trained_in = next(e.dtype for key, e in entries.items() if adapted(key.removeprefix("model.")))
    allocate(model, device, dtype or trained_in)
    load_base(recipe.base, setting, model, None)
    checkpoint.load(str(folder), setting, model, None)
    return model.eval(), config
