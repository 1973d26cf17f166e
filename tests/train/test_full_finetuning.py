"""Fine-tuning of all weights is what anybody would write in a dozen lines of PyTorch on Hugging Face's model."""

from pathlib import Path

import torch
import torch.nn.functional as F

from nano3.train.step import training_step
from tests.oracles import hf_model, hf_name, relative
from tests.train.small import trainer

BOUND = 1e-6
LR = 5e-6  # NVIDIA's for fine-tuning; both programs run in fp32, so an update of 1e-4 of a weight is known to 1e-2
PLAIN = [  # what the oracle has not
    "model.moe_aux_loss_coeff=0",
    "peft.freeze_router=false",
    "model.moe_router_bias_update_rate=0",
    "train.precision=fp32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "model.hybrid_override_pattern=ME*-ME",
]


def test_five_steps_equal_autograd_and_torchs_adamw_on_transformers_model(tmp_path: Path) -> None:
    """Loss over the answers' tokens only, clipping at a norm below the gradient's, decay of matrices alone."""
    config = trainer(*PLAIN).config
    theirs = hf_model(config.model)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    theirs.save_pretrained(tmp_path)
    t = trainer(*PLAIN, f"checkpoint.pretrained_checkpoint={tmp_path}")
    start = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    o = config.optimizer
    groups = [[p for p in theirs.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    adamw = torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay} for ps, decay in zip(groups, (o.weight_decay, 0.0), strict=True)],
        lr=LR,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
    )
    for _ in range(5):
        rows = next(t.batches)
        rows = [b._replace(labels=b.labels.where(torch.rand(b.labels.shape, generator=g) < 0.6, -100)) for b in rows]
        report = training_step(t.model, t.optimizer, rows, config, t.mesh, LR, False)
        tokens, labels = (torch.cat([b[i] for b in rows]) for i in (0, 1))
        loss = F.cross_entropy(theirs(tokens, use_cache=False).logits.flatten(0, 1), labels.flatten())
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), o.clip_grad)
        adamw.step()
        assert abs(report.loss - loss.item()) <= BOUND * loss.item()
        assert abs(report.grad_norm - norm.item()) <= 10 * BOUND * norm.item()
    reference = dict(theirs.named_parameters())
    for name, p in t.model.named_parameters():
        assert relative(p.detach(), reference[hf_name(name)].detach()) <= BOUND, name
        assert (p.detach() - start[name]).abs().max() > LR, name
