"""Generation: prefill the prompt in chunks, then one token at a time over the cache.

python -m nano3.model.generate --checkpoint runs/tiny --prompt "def "
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from nano3.config import UserError
from nano3.model.cache import create_cache
from nano3.model.model import Nano3
from nano3.parallel.pipeline import Wire, broadcast_int, relay


@torch.inference_mode()
def generate(
    model: Nano3,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    prefill_chunk: int = 2048,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt`; a stop id ends the text and is not yielded.

    temperature 0 is greedy; otherwise the logits are divided by it and sampled from the smallest set of ids whose
    probability reaches top_p.  `prefill_chunk`: tokens of the prompt computed at once; the result does not depend
    on it.  Under any layout every rank calls this and gets the same ids: one rank of the last stage chooses, for all.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token to continue")
    mesh, device, D = model.mesh, model.mesh.device, model.config.hidden_size
    capacity = len(prompt) + max_new_tokens
    cache = create_cache(model.config, 1, capacity, model.dtype, device, mesh.tp.size)
    draws = torch.Generator().manual_seed(seed)

    def advance(ids: Tensor) -> Tensor:  # (1, S) -> (1, D) after its last token
        wire = Wire(mesh, len(model.parts), (*ids.shape, D), model.dtype)
        return relay(wire, lambda part, x: model(ids if x is None else x, cache=cache, part=part).hidden)[:, -1]

    def step(token: int) -> Tensor:
        wire = Wire(mesh, len(model.parts), (1, D), model.dtype)
        ids = torch.tensor([token], device=device)
        return relay(wire, lambda part, x: model.step(ids if x is None else x, cache, part))

    for ids in torch.tensor([prompt], device=device).split(prefill_chunk, dim=1):
        hidden = advance(ids)
    for i in range(max_new_tokens):
        logits = model.logits(hidden) if model.has_end else None
        chooser = mesh.layout.block * (mesh.pp.size - 1)
        token = choose(logits[0], temperature, top_p, draws) if mesh.rank == chooser else 0
        token = broadcast_int(token, chooser, mesh)
        if token in stop_ids:
            return
        yield token
        if i + 1 < max_new_tokens:
            hidden = step(token)


def choose(logits: Tensor, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """One id from (V,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    probs, ids = (logits.float().cpu() / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # drop what comes after the mass is reached; the first always stays
    return int(ids[torch.multinomial(probs, 1, generator=draws)])


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m nano3.model.generate", description="Continue a prompt.")
    p.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run folder, its checkpoints, or one iter_NNNNNNN"
    )
    p.add_argument("--prompt", required=True, help="text; token ids if the model was trained on mock data")
    p.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)")
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop-ids", type=int, nargs="*", help="ids that end the text (default: the tokenizer's)")
    p.add_argument("--prefill-chunk", type=int, default=2048, metavar="N", help="prompt tokens computed at once")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--tokenizer-model", metavar="PATH", help="default: the one it was trained with")
    args = p.parse_args()
    # The command line sits above the library: reading checkpoints and data is not the model's business.
    from nano3.adapters import load_model
    from nano3.data.corpus import open_tokenizer
    from nano3.parallel.mesh import pick_device

    try:
        for name, ok in [
            ("max-new-tokens", args.max_new_tokens >= 0),
            ("temperature", args.temperature >= 0),
            ("top-p", 0 < args.top_p <= 1),
            ("prefill-chunk", args.prefill_chunk >= 1),
        ]:
            if not ok:
                raise UserError(f"--{name} {getattr(args, name.replace('-', '_'))} is out of range")
        model, config = load_model(args.checkpoint, "--checkpoint", pick_device(args.device, setting="--device "))
        tokenizer = open_tokenizer(config, args.tokenizer_model)
        prompt = tokenizer.encode(args.prompt)
        stream = generate(
            model,
            prompt,
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            stop_ids=tokenizer.stop_ids if args.stop_ids is None else args.stop_ids,
            prefill_chunk=args.prefill_chunk,
        )
        ids, shown = list(prompt), ""
        for token in stream:
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # an unfinished character: wait for its other bytes
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(tokenizer.decode(ids)[len(shown) :])
    except UserError as error:
        print(f"generate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
