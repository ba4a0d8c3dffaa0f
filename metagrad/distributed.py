"""One training run over several processes, as `torchrun` starts them: each has its part of every batch.

    ranks = mg.distributed.start()
    step = mg.TrainStep(loss, optimizer, ranks=ranks)
    result = mg.metagradient(metric, step, params, ranks.part(batches), meta)   # on every rank, the same result

The pullback of a mean is a sum over examples, so each rank pulls back its own, and one sum of finished numbers over the
ranks makes it whole: no collective is differentiated. `Sharded(step)` also divides the state among them.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from metagrad._ranks import Ranks
from metagrad._sharded import Sharded
from metagrad._types import RankError

__all__ = ["RankError", "Ranks", "Sharded", "start"]


def start(timeout: float = 60.0) -> Ranks:
    """The processes that `torchrun` started, or those of the process group that there is already.

    On GPUs each process is given the one of its LOCAL_RANK, and they talk by NCCL; otherwise by gloo.

    Args:
        timeout: seconds after which a rank that waits for the others gives up with a `RankError`. Above what the
            slowest of them takes for one step, the first compilation included.

    Raises:
        ValueError: where nothing says which processes there are, or for a timeout that is not positive.
        RankError: if they do not all come within it.
    """
    if not timeout > 0:
        raise ValueError(f"`timeout` is {timeout}. Pass seconds above 0.")
    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise ValueError(
                "there are no other processes: start the program by `torchrun --nproc-per-node N program.py`, or call "
                "torch.distributed.init_process_group before."
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank())
    try:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=limit)
        # A group of its own: its time limit, and nobody else's collectives.
        return Ranks(dist.new_group(timeout=limit), timeout)
    except RuntimeError as error:
        raise RankError(f"the ranks did not come together in {timeout:g} s: {str(error).splitlines()[0]}") from error
