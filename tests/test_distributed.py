"""RepOptimizers under DDP and FSDP2, on two real gloo processes."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from repopt.grad_mult import rep_branches
from repopt.search import to_hyper_search
from repopt.optim import RepAdamW, RepASGD, RepSGD, attach, clip_grad_norm_, rep_optimizer
from repopt.scales import Scales, extract_scales


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Tanh(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()


def scales():
    g = torch.Generator().manual_seed(1)
    return Scales({f"{i}.weight": {n: torch.randn(8, generator=g, dtype=torch.float64) for n in rep_branches(net()[i])}
                   for i in (0, 2)})


def batches(n=6):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(5, (8,), generator=g))
            for _ in range(n)]


MAKE = dict(sgd=lambda p: RepSGD(p, lr=.1, momentum=.9, nesterov=True, weight_decay=1e-2, scales=scales()),
            adamw=lambda p: RepAdamW(p, lr=1e-2, scales=scales()))


def train(model, make, data):
    opt = make(model.named_parameters())
    for x, y in data:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
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
        full = {n.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for n, p in model.named_parameters()}
        torch.save(full, f"{folder}/{rank}.pt")
    finally: dist.destroy_process_group()


@pytest.mark.parametrize("which", MAKE)
@pytest.mark.parametrize("how,tolerance", [("same", 0), ("halves", 1e-12), ("fsdp2", 1e-12)])
def test_two_processes_step_as_one(tmp_path, how, tolerance, which):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mp.spawn(worker, (str(tmp_path), how, which), nprocs=2)
    one = net()
    train(one, MAKE[which], batches())
    torch.set_num_threads(threads)
    a, b = (torch.load(tmp_path/f"{r}.pt") for r in (0, 1))
    for n, p in one.named_parameters():
        assert torch.equal(a[n], b[n]), f"{n}: the ranks differ"
        far = ((a[n] - p).norm()/p.norm()).item()
        assert far <= tolerance, f"{n}: {far:.1e} from one process"


def sharded(rank, folder):
    "Everything around the step of a net that FSDP2 has sharded; what rank 0 and rank 1 found goes into files"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh, out = init_device_mesh("cpu", (2,)), {}
        whole = lambda model: {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}
        def shard(model):
            fully_shard(model, mesh=mesh)
            return model
        for how, make in AROUND.items():
            model = shard(net())
            found = norms(model, make)
            out[how] = whole(model), found
        with torch.device("meta"): model = net()
        model = shard(model)
        try: scales().reinitialize_(model)
        except ValueError as e: out["meta"] = str(e)
        model.to_empty(device="cpu")
        scales().reinitialize_(model, torch.Generator().manual_seed(5 + rank))
        out["reinitialized"] = whole(model)
        model = shard(net())
        explicit = rep_optimizer(torch.optim.SGD, "explicit")
        try: explicit(model.named_parameters(), lr=.1, scales=scales())
        except ValueError as e: out["explicit"] = str(e)
        out["searched"] = dict(extract_scales(shard(search_net())).flat())
        try: to_hyper_search(shard(net()))
        except ValueError as e: out["search of a sharded net"] = str(e)
        torch.save(out, f"{folder}/{rank}.pt")
    finally: dist.destroy_process_group()


def attached(params):
    opt = torch.optim.SGD(params, lr=.1, momentum=.9)
    attach(opt, scales())
    return opt


AROUND = dict(sgd=MAKE["sgd"], adamw=MAKE["adamw"], asgd=lambda p: RepASGD(p, lr=.1, scales=scales()),
              attached=attached, stretched=lambda p: rep_optimizer(torch.optim.Adam, "update")(
                  p, lr=.01, scales=scales()))


def norms(model, make):
    "The norms of three clipped steps, each smaller than it was"
    opt, found = make(model.named_parameters()), []
    for x, y in batches(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(float(clip_grad_norm_(opt, .01)))
        opt.step()
    return found


def search_net():
    torch.manual_seed(3)
    return to_hyper_search(net())


def test_around_the_step_of_a_sharded_net(tmp_path):
    """Clipping, ASGD, attached scales, stretched updates, a start from the meta device and extraction: as in one
    process, or one line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mp.spawn(sharded, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path/f"{r}.pt") for r in (0, 1))
    for how, make in AROUND.items():
        one = net()
        found = norms(one, make)
        assert a[how][1] == b[how][1] == pytest.approx(found, rel=1e-12) and min(found) > .01, how
        for n, p in one.named_parameters():
            ours = a[how][0][n]
            assert torch.equal(ours, b[how][0][n]) and (ours - p).norm() <= 1e-12*p.norm(), f"{how}: {n}"
    one = scales().reinitialize_(net(), torch.Generator().manual_seed(5))
    for found in (a, b):
        assert all(torch.equal(found["reinitialized"][n], one.get_parameter(n)) for n in scales())
        assert all(torch.equal(found["searched"][n], s) for n, s in extract_scales(search_net()).flat().items())
        assert "to_empty" in found["meta"] and "explicit branches need whole kernels" in found["explicit"]
        assert "then call fully_shard" in found["search of a sharded net"]
    torch.set_num_threads(threads)


def test_fsdp1_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for names in (False, True):
            model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=names)
            with pytest.raises(ValueError, match="fully_shard"): MAKE["sgd"](model.named_parameters())
    finally: dist.destroy_process_group()
