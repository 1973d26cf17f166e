"""Train a Nemotron 3 Nano.

python train.py --mode pretrain --preset tiny                                          one process, any machine
torchrun --nproc-per-node=8 train.py --mode pretrain --preset ladder-1b                one process per GPU
python train.py --mode pretrain --preset tiny optimizer.lr=1e-3 train.train_iters=50   any setting as section.key=value
"""

import os
import sys
import time

from nano3.cli import parser, resolve
from nano3.config import UserError


def leave(status: int) -> None:
    """End the process; a rank of several without Python's finalisation.

    The communication threads may still let go of their last tensors then, for which they need the interpreter: Python
    before 3.14 ends such a thread in a way that aborts the whole process ("terminate called without an active
    exception"), and torchrun would call a finished run a failure.  Logs and checkpoints are closed by now.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main() -> int:
    world, rank, local_rank, ranks_here = (
        int(os.environ.get(k, d))
        for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    args = parser().parse_args()
    # GPU memory in segments that grow: tensors whose sizes change from step to step (rows that come from other ranks,
    # packed rows) then neither split it into pieces too small for the next, nor make a step wait for cudaMalloc.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # A queue of the GPU for each stream, as far as there are: messages of one group then never wait behind another's.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    try:
        config, name = resolve(args)
        import torch  # after the command line is known to be sound: it takes seconds

        from nano3.train.plan import check_fits, dry_run

        gpu = config.train.device != "cpu" and torch.cuda.is_available()
        device_type = "cuda" if gpu else "cpu"
        if args.dry_run:
            text = dry_run(config, name, args.world_size, device_type, ranks_here)
            if rank == 0:
                print(text)
            return 0
        if gpu and local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)  # before anything is asked of a GPU
        check_fits(config, name, world, device_type, ranks_here)
        from nano3.parallel.layout import check_layout

        check_layout(config, world)
    except UserError as error:
        if rank > 0:  # in general all ranks find the same, and torchrun ends them when the first one leaves
            time.sleep(10)
        print(f"train.py: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2

    from nano3.parallel.mesh import LostContact, create_mesh
    from nano3.train.loop import Trainer, TrainingError, keep_freed_memory

    try:
        if device_type == "cpu":
            keep_freed_memory()
        mesh = create_mesh(config, world, rank, local_rank)
        status = Trainer(config, name, mesh).run()
        if world > 1:  # together: a rank that is gone too early takes its connections from the others
            torch.distributed.barrier(group=mesh.host)
        return status
    except (UserError, TrainingError) as error:
        print(f"train.py: error: {f'rank {rank}: ' if world > 1 else ''}{error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except LostContact as error:
        print(f"train.py: rank {rank}: {error}", file=sys.stderr)
        time.sleep(3)  # let torchrun see the rank that failed first, and name it
        return 1
    except KeyboardInterrupt:
        print("train.py: stopped at once, nothing saved since the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    leave(main())
