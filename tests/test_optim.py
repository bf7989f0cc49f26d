"""RepOptimizers against explicit branches on random blocks, a golden trajectory, and a machine without a compiler."""
import os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from repopt.grad_mult import rep_branches
from repopt.models import create_model, initial_scales
from repopt.groups import param_groups
from repopt.doctor import check_equivalence
from repopt.optim import RepAdamax, RepAdamW, RepASGD, RepSGD, rep_optimizer
from repopt.rules import RULES, Lion
from repopt.scales import Scales

ROOT, GOLDEN = Path(__file__).resolve().parents[1], Path(__file__).with_name("golden_repsgd.txt")
LR = {"SGD": .05, "ASGD": .05, "Adadelta": .5, "Lion": 1e-4, "Rprop": 1e-4}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cls=st.sampled_from([c for c in RULES if c.__name__ != "Rprop"]), groups=st.sampled_from([1, 2, 4]),
       kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]),
       wider=st.booleans(), channels_last=st.booleans(), decay=st.sampled_from([0., 1e-2]),
       magnitude=st.sampled_from([1e-3, 1., 30.]), seed=st.integers(0, 10**6))
def test_every_rule_equals_explicit_branches(cls, groups, kernel, stride, wider, channels_last, decay, magnitude, seed):
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(8, 16 if wider else 8, kernel, stride, kernel//2, groups=groups).double()
    scales = Scales({"0.weight": {n: torch.randn(conv.out_channels,
                                                 dtype=torch.float64)*magnitude*(torch.rand(conv.out_channels) > .1)
                                                 for n in rep_branches(conv)}})
    if decay and cls.__name__ not in ("SGD", "AdamW", "Lion"): decay = 0.  # the others' decay is coupled: refused
    kw = dict(scales=scales, lr=LR.get(cls.__name__, 3e-3),
              **({} if cls.__name__ == "Rprop" else dict(weight_decay=decay)),
              **(dict(momentum=.9, nesterov=True) if cls.__name__ == "SGD" else {}))
    nets = [torch.nn.Sequential(conv, torch.nn.Tanh()).double() for _ in range(2)]
    nets[1] = torch.nn.Sequential(torch.nn.Conv2d(8, conv.out_channels, kernel, stride, kernel//2,
                                                  groups=groups).double(), torch.nn.Tanh())
    scales.reinitialize_(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    kw["scales"] = scales
    if channels_last: nets = [n.to(memory_format=torch.channels_last) for n in nets]
    opts = [rep_optimizer(cls)(nets[0].named_parameters(), **kw),
            rep_optimizer(cls, "explicit")(nets[1].named_parameters(), **kw)]
    for _ in range(8):
        x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
        target = torch.randn_like(nets[0](x))
        for net, opt in zip(nets, opts):
            opt.zero_grad()
            F.mse_loss(net(x), target).backward()
            opt.step()
    a, b = (n[0].weight.detach() for n in nets)
    assert (a - b).norm() <= 1e-9*b.norm(), (cls.__name__, float((a - b).norm()/b.norm()))


@pytest.mark.parametrize("way", [None, "explicit"])
@pytest.mark.parametrize("cls,degree", [(torch.optim.SGD, 1), (Lion, 0)])
def test_the_grad_mult_written_out(cls, degree, way):
    """Eq. 3 and 14 by hand: s² everywhere, t² in the centre, 1 on its diagonal; |s|, |t|, 1 for a sign.

    1 is an identity's constant whatever value its search ended with; of s and t the sign means nothing."""
    torch.manual_seed(0)
    (s, t, searched), diagonal = torch.randn(3, 8, dtype=torch.float64), torch.arange(8)
    W, G = torch.randn(2, 8, 8, 3, 3, dtype=torch.float64)
    M = (s.abs()**(degree + 1)).reshape(8, 1, 1, 1).repeat(1, 8, 3, 3)
    M[:, :, 1, 1] += (t.abs()**(degree + 1)).reshape(8, 1)
    M[diagonal, diagonal, 1, 1] += 1
    p = nn.Parameter(W.clone())
    opt = rep_optimizer(cls, way)([("p", p)], lr=.1,
                                  scales=Scales({"p": dict(conv=s, conv_1x1=t, identity=searched)}))
    p.grad = G.clone()
    opt.step()
    torch.testing.assert_close(p.detach(), W - .1*M*(G if degree else G.sign()), rtol=1e-12, atol=1e-12)


def golden_losses(scaled=1.):
    """100 losses of RepSGD, its scales times `scaled`, in float64.

    All that chance decides is drawn uniformly: normal draws differ in their last bits from one kind of CPU to
    another."""
    torch.manual_seed(0)
    layer = lambda c, o, stride: [nn.Conv2d(c, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*layer(1, 8, 1), *layer(8, 8, 1), *layer(8, 16, 2), *layer(16, 16, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).double()
    scales = Scales.initial(model)
    scales.reinitialize_(model, torch.Generator().manual_seed(0), init="torch")
    opt, losses = RepSGD(param_groups(model, 4e-5), lr=.05, momentum=.9, nesterov=True,
                         scales=scales.map(lambda s: s*scaled)), []
    for _ in range(100):
        x, y = torch.rand(32, 1, 8, 8, dtype=torch.float64), torch.randint(10, (32,))
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def test_golden_trajectory():
    """The losses of the file to 1e-10, on any CPU; with scales off by a millionth, not even to 1e-6.

    `python tests/test_optim.py` writes the file anew."""
    want = [float.fromhex(v) for v in GOLDEN.read_text().split()]
    assert golden_losses() == pytest.approx(want, rel=1e-10)
    assert golden_losses(1 + 1e-6) != pytest.approx(want, rel=1e-6)


def test_without_a_compiler_one_warning_and_the_same_step(tmp_path):
    code = """
import warnings, torch
from repopt import RepSGD, Scales
torch.manual_seed(0); p = torch.nn.Parameter(torch.randn(8, 8, 3, 3)); q = torch.nn.Parameter(p.detach().clone())
s = Scales({'p': dict(conv=torch.rand(8), conv_1x1=torch.rand(8), identity=torch.ones(8))})
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    for compiled, r in ((True, p), (False, q)):
        opt = RepSGD([('p', r)], lr=.1, momentum=.9, scales=s, compiled=compiled); torch.manual_seed(1)
        for _ in range(3): r.grad = torch.randn(8, 8, 3, 3); opt.step()
told = [x for x in w if 'could not be compiled' in str(x.message)]
assert len(told) == 1, [str(x.message) for x in w]
torch.testing.assert_close(p, q)
"""
    env = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
           "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PATH": str(tmp_path)}
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert r.returncode == 0, r.stderr


def test_compiled_steps_keep_float64():
    "Learning rate and bias corrections reach the compiled step in the kernel's precision, whatever torch's default is"
    scales, out = Scales({"p": dict(conv=torch.rand(8), conv_1x1=torch.rand(8), identity=torch.ones(8))}), []
    for cls in (RepSGD, RepAdamW):
        for compiled in (False, True):
            torch.manual_seed(0)
            p = torch.nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.float64))
            opt = cls([("p", p)], lr=1e-3, scales=scales, compiled=compiled)
            for _ in range(3):
                p.grad = torch.randn_like(p)
                opt.step()
            out.append(p.detach())
        torch.testing.assert_close(out[-1], out[-2], rtol=1e-14, atol=1e-14)


def test_scales_of_a_real_search_are_float32_and_the_check_is_float64():
    conv, scales = torch.nn.Conv2d(8, 8, 3, padding=1), {n: torch.rand(8) for n in ("conv", "conv_1x1", "identity")}
    net, data = torch.nn.Sequential(conv, torch.nn.Tanh(),
                                    torch.nn.Flatten()), [(torch.randn(4, 8, 4, 4), torch.randint(5, (4,)))
                                                          for _ in range(5)]
    for make in (lambda p, s: RepSGD(p, lr=1e-3, momentum=.9, scales=s),
                 lambda p, s: RepSGD(p, lr=1e-3, momentum=.9, scales=s, compiled=True),
                 lambda p, s: RepASGD(p, lr=1e-3, scales=s), lambda p, s: RepAdamW(p, lr=1e-3, scales=s)):
        r = check_equivalence(net, Scales({"0.weight": scales}), make, data, steps=5)
        assert r["exact"], r


def test_capturable_keeps_the_count_on_the_device():
    """The same steps with the bias corrections as tensors (in float32, as torch has them).

    On a GPU this is what a CUDA graph captures."""
    scales, out = Scales({"p": dict(conv=torch.rand(8), conv_1x1=torch.rand(8), identity=torch.ones(8))}), []
    for cls in (RepAdamW, RepAdamax):
        for capturable in (False, True):
            torch.manual_seed(0)
            p = torch.nn.Parameter(torch.randn(8, 8, 3, 3))
            opt = cls([("p", p)], lr=torch.tensor(1e-2), scales=scales, capturable=capturable)
            for _ in range(5):
                p.grad = torch.randn_like(p)
                opt.step()
            out.append(p.detach())
        torch.testing.assert_close(out[-1], out[-2], rtol=1e-5, atol=1e-6)


def test_capturable_counts_each_kernel_by_itself():
    "One that was frozen for three steps has its own bias corrections; so it is after a state has been loaded"
    scales, out = Scales({n: dict(conv=torch.rand(8), conv_1x1=torch.rand(8)) for n in "pq"}), []
    for capturable in (False, True):
        torch.manual_seed(0)
        p, q = (torch.nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in "pq")
        make = lambda: RepAdamW([("p", p), ("q", q)], lr=torch.tensor(1e-2), scales=scales, capturable=capturable)
        opt = make()
        for step in range(6):
            p.grad, q.grad = torch.randn_like(p), torch.randn_like(q) if step > 2 else None
            if step == 4:
                state, opt = opt.state_dict(), make()
                opt.load_state_dict(state)
            opt.step()
        out.append(torch.stack([p.detach(), q.detach()]))
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-6)


def test_gradscaler_and_accumulation():
    torch.manual_seed(0)
    scales, out = initial_scales("repoptvgg_digits"), []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = create_model("repoptvgg_digits", num_classes=10, in_chans=1).double().eval()
        opt, scaler = RepSGD(param_groups(model), lr=.01, momentum=.9, scales=scales), torch.amp.GradScaler(
            "cpu", enabled=scaled, init_scale=2.**12)
        for _ in range(3):
            opt.zero_grad()
            for _ in range(2):
                x, y = torch.randn(4, 1, 8, 8).double(), torch.randint(10, (4,))
                scaler.scale(F.cross_entropy(model(x), y)/2).backward()
            scaler.step(opt)
            scaler.update()
        out.append(model.stage3[2].conv.weight.detach())
    torch.testing.assert_close(out[0], out[1], rtol=1e-12, atol=1e-14)


if __name__ == "__main__": GOLDEN.write_text("".join(f"{v.hex()}\n" for v in golden_losses()))
