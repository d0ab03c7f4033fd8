"""One loss over the batches of several processes, whose gradient is that of one process on the joined batch.

torchrun --nproc-per-node 2 -m fgfast.examples.ring
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fgfast import NTXentLoss


def main() -> dict[str, float]:
    """Compare the gradient of the ranks with that of the joined batch, which each computes for the comparison."""
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")  # on GPUs: "nccl", and tensors on the device of LOCAL_RANK
    else:
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights and images on every rank
    alone = nn.Linear(64, 32)
    together = DistributedDataParallel(nn.Linear(64, 32))
    together.module.load_state_dict(alone.state_dict())
    views = torch.randn(501, 2, 64)  # two views of 501 images: the ranks need not have as many each
    mine = together(views[rank::world])
    loss = NTXentLoss(temperature=0.1, group=dist.group.WORLD)(mine[:, 0], mine[:, 1])  # keys go round the ring
    loss.backward()  # DistributedDataParallel averages the gradients of the ranks

    joined = alone(views)
    expected = NTXentLoss(temperature=0.1)(joined[:, 0], joined[:, 1])
    expected.backward()
    ours, theirs = together.module.weight.grad, alone.weight.grad
    assert ours is not None
    assert theirs is not None
    difference = float((ours - theirs).norm() / theirs.norm())
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    mean /= world
    if rank == 0:
        print(f"{world} ranks, {len(mine)} images on this one: mean loss {mean:.6f}, joined batch {expected:.6f}")
        print(f"gradients differ by {difference:.1e}")
    dist.barrier()  # a rank that ends while the other still takes leave of it may abort
    dist.destroy_process_group()
    return {"ranks": world, "loss": float(mean), "joined": expected.item(), "difference": difference}


if __name__ == "__main__":
    main()
