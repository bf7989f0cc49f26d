"""RepOptimizers under DDP and FSDP2, on two real gloo processes."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from repopt.grad_mult import rep_branches
from repopt.optim import RepAdamW, RepSGD
from repopt.scales import Scales


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()


def scales():
    g = torch.Generator().manual_seed(1)
    return Scales({f"{i}.weight": {n: torch.randn(8, generator=g, dtype=torch.float64) for n in rep_branches(net()[i])} for i in (0, 2)})


def batches(n=6):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(5, (8,), generator=g)) for _ in range(n)]


MAKE = dict(sgd=lambda p: RepSGD(p, lr=.1, momentum=.9, nesterov=True, weight_decay=1e-2, scales=scales()), adamw=lambda p: RepAdamW(p, lr=1e-2, scales=scales()))


def train(model, make, data):
    opt = make(model.named_parameters())
    for x, y in data: opt.zero_grad(); nn.functional.cross_entropy(model(x), y).backward(); opt.step()
    return opt


def worker(rank, folder, how, which):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model, data = net(), batches()
        if how == "halves": data = [(x[rank::2], y[rank::2]) for x, y in data]
        if how == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        else: model = nn.parallel.DistributedDataParallel(model)
        train(model, MAKE[which], data)
        full = {n.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()}
        torch.save(full, f"{folder}/{rank}.pt")
    finally: dist.destroy_process_group()


@pytest.mark.parametrize("which", MAKE)
@pytest.mark.parametrize("how,tolerance", [("same", 0), ("halves", 1e-12), ("fsdp2", 1e-12)])
def test_two_processes_step_as_one(tmp_path, how, tolerance, which):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    mp.spawn(worker, (str(tmp_path), how, which), nprocs=2)
    one = net(); train(one, MAKE[which], batches()); torch.set_num_threads(threads)
    a, b = (torch.load(tmp_path/f"{r}.pt") for r in (0, 1))
    for n, p in one.named_parameters():
        assert torch.equal(a[n], b[n]), f"{n}: the ranks differ"
        far = ((a[n] - p).norm()/p.norm()).item()
        assert far <= tolerance, f"{n}: {far:.1e} from one process"


def test_fsdp1_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for names in (False, True):
            model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=names)
            with pytest.raises(ValueError, match="fully_shard"): MAKE["sgd"](model.named_parameters())
    finally: dist.destroy_process_group()
