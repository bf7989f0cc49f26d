"""RepOptimizers in the hands of others: Lightning, accelerate, timm, torch's lists of inputs.

And nets as people write them."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

with pytest.MonkeyPatch.context() as m:  # that import forbids, to all tests, to set backends' flags
    m.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_optimizers import optim_db

from repopt.csla import CSLA, Block
from repopt.grad_mult import constants, named_branch
from repopt.search import to_hyper_search
from repopt.groups import param_groups
from repopt.doctor import check_equivalence
from repopt.optim import RepAdamW, RepSGD, attach, clip_grad_norm_, rep_optimizer
from repopt.rules import RULES
from repopt.scales import Scales, extract_scales

SGD = dict(lr=.05, momentum=.9, nesterov=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Tanh(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()


def some_scales(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda v: torch.randn(len(v), generator=g, dtype=torch.float64)
    return Scales({p: {b: draw(v) for b, v in bs.items()} for p, bs in Scales.initial(model).items()})


def batches(n=6):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 8, 8, generator=g).double(), torch.randint(5, (8,), generator=g)) for _ in range(n)]


def far(a, b): return max(float((p - q).norm()/q.norm()) for p, q in zip(a.parameters(), b.parameters()))


def plainly(make, data, clip=None, schedule=None):
    "A net trained by a loop written out"
    model = net()
    opt = make(model)
    then = schedule and schedule(opt)
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip: clip_grad_norm_(opt, clip)
        opt.step()
        if then: then.step()
    return model, opt


def rep(model): return RepSGD(param_groups(model, 1e-2), scales=some_scales(model), **SGD)


def attached(model):
    opt = torch.optim.SGD(param_groups(model, 1e-2), **SGD)
    attach(opt, some_scales(model))
    return opt


MAKE = dict(rep=rep, attached=attached, adamw=lambda m: RepAdamW(m.named_parameters(), lr=1e-2, scales=some_scales(m)))
made = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


# --- Lightning

def lightning_module(make, clip):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, i): return F.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return make(self.net)
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if clip: clip_grad_norm_(optimizer, clip)

    return Module()


def trainer(folder, epochs):
    import lightning.pytorch as pl
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, **quiet)


@made
@pytest.mark.parametrize("clip", [None, .05], ids=["free", "clipped"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_and_resumes_as_a_loop_does(tmp_path, make, clip):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches(3)))), batch_size=8)
    first, second = lightning_module(make, clip), lightning_module(make, clip)
    t = trainer(tmp_path, 1)
    t.fit(first, data)
    t.save_checkpoint(tmp_path/"epoch.ckpt")
    trainer(tmp_path, 2).fit(second, data, ckpt_path=tmp_path/"epoch.ckpt", weights_only=True)
    assert far(first.net, plainly(make, batches(3), clip)[0]) <= 1e-12
    assert far(second.net, plainly(make, batches(3)*2, clip)[0]) <= 1e-12


def test_lightning_and_fabric_wrappers_are_looked_through():
    from lightning.fabric.wrappers import _FabricOptimizer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    for wrap in (LightningOptimizer, lambda opt: _FabricOptimizer(opt, None)):
        norms = []
        for clothed in (False, True):
            model = net()
            opt = rep(model)
            x, y = batches(1)[0]
            F.cross_entropy(model(x), y).backward()
            norms.append(float(clip_grad_norm_(wrap(opt) if clothed else opt, .01)))
        assert norms[0] == norms[1]


# --- accelerate

@made
def test_accelerate_prepares_clips_saves_and_loads(tmp_path, make):
    from accelerate import Accelerator
    whole, _ = plainly(make, batches(), .05, lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, .5))
    a = Accelerator(cpu=True)

    def prepared(seed):
        model = net(seed)
        opt = make(model)
        return a.prepare(model, opt, torch.optim.lr_scheduler.StepLR(opt, 2, .5))

    def steps(model, opt, schedule, data):
        for x, y in data:
            opt.zero_grad()
            a.backward(F.cross_entropy(model(x), y))
            clip_grad_norm_(opt, .05)
            opt.step()
            schedule.step()

    one = prepared(0)
    steps(*one, batches()[:3])
    a.save_state(str(tmp_path/"state"))
    a.free_memory()
    two = prepared(0)
    a.load_state(str(tmp_path/"state"))
    steps(*two, batches()[3:])
    a.free_memory()
    assert far(two[0], whole) <= 1e-12


# --- timm

def test_timm_average_scaler_and_schedulers():
    from timm.scheduler import CosineLRScheduler, StepLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler
    cosine = lambda opt: CosineLRScheduler(opt, t_initial=6, warmup_t=2, warmup_lr_init=1e-3)
    for kind in (cosine, lambda opt: StepLRScheduler(opt, decay_t=2, decay_rate=.5)):
        nets, averages = [net(), net()], []
        for model, cls in zip(nets, (RepSGD, rep_optimizer(torch.optim.SGD, "explicit"))):
            opt = cls(param_groups(model, 1e-2), scales=some_scales(model), **SGD)
            average, schedule, scaler = ModelEmaV3(model, decay=.9), kind(opt), NativeScaler("cpu")
            for i, (x, y) in enumerate(batches()):
                opt.zero_grad()
                scaler(F.cross_entropy(model(x), y), opt, parameters=model.parameters())
                average.update(model)
                schedule.step(i + 1)
            averages.append(average.module)
        assert far(*nets) <= 1e-12 and far(*averages) <= 1e-12
        assert far(nets[0], net()) > 1e-3


# --- clipping

@made
def test_the_clipped_norm_is_that_of_the_branches(make):
    model = net()
    opt, scales = make(model), some_scales(model)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    want = 0.
    for n, p in model.named_parameters():
        M = 1.
        if n in scales:
            alphas = constants(scales[n])
            M = Block(model.get_submodule(n.removesuffix(".weight")), {b: named_branch(b) for b in alphas},
                      alphas).grad_mult()
        want += float((M*p.grad.square()).sum())
    assert float(clip_grad_norm_(opt, 1e9)) == pytest.approx(want**.5, rel=1e-12)
    clip_grad_norm_(opt, .01)
    assert float(clip_grad_norm_(opt, 1e9)) == pytest.approx(.01, rel=1e-3)


def test_optimizers_without_scales_are_refused_by_name():
    model = net()
    for opt in (torch.optim.SGD(model.parameters(), lr=.1), torch.optim.Adam(model.parameters())):
        with pytest.raises(ValueError, match=f"{type(opt).__name__}.*torch.nn.utils.clip_grad_norm_"):
            clip_grad_norm_(opt, 1.)


# --- torch's own lists of inputs

DB = {info.optim_cls: info for info in optim_db if info.optim_cls in RULES}


def test_every_rule_that_torch_has_is_in_its_list():
    assert set(DB) == {c for c in RULES if c.__module__.startswith("torch")}


def trained(cls, inputs, wrap, **kw):
    "Three steps on one conv; None and the reason where `cls` refuses these inputs"
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    kwargs = copy.deepcopy(inputs.kwargs)
    try: opt = cls(wrap(conv), **kwargs, **kw)
    except (ValueError, RuntimeError) as e: return None, str(e)
    for i in range(3):
        torch.manual_seed(i)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        opt.zero_grad()
        F.mse_loss(conv(x), x).backward()
        try: opt.step()
        except (ValueError, RuntimeError) as e: return None, str(e)
    return conv, ""


@pytest.mark.parametrize("cls", DB, ids=lambda c: c.__name__)
def test_every_input_of_torchs_lists(cls):
    """With scales of 1 and no other branch it is torch's own; with any scales the explicit branches'.

    What it refuses it names."""
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    ones, some = Scales({"weight": dict(conv=torch.ones(4, dtype=torch.float64))}), some_scales(nn.Sequential(conv))
    some, named = Scales({"weight": some["0.weight"]}), lambda c: c.named_parameters()
    met = 0
    for inputs in DB[cls].optim_inputs_func(device="cpu"):
        stock, why_not = trained(cls, inputs, lambda c: c.parameters())
        same, refused = trained(rep_optimizer(cls), inputs, named, scales=ones)
        if stock is None:
            assert same is None, (inputs.kwargs, why_not)
            continue
        if same is None:
            decay = inputs.kwargs.get("weight_decay") and "weight_decay" in refused
            named_option = any(o in refused for o in ("differentiable", "capturable") if inputs.kwargs.get(o))
            assert decay or named_option, (inputs.kwargs, refused)
            continue
        assert far(same, stock) <= 1e-7, (inputs.kwargs, far(same, stock))
        ours, _ = trained(rep_optimizer(cls), inputs, named, scales=some)
        branches, _ = trained(rep_optimizer(cls, "explicit"), inputs, named, scales=some)
        assert far(ours, branches) <= 1e-7, (inputs.kwargs, far(ours, branches))
        met += 1
    assert met >= 2


@pytest.mark.parametrize("cls", DB, ids=lambda c: c.__name__)
def test_every_wrong_input_of_torchs_lists(cls):
    for error in DB[cls].optim_error_inputs_func(device="cpu", dtype=torch.float64):
        wrong, p = error.optimizer_error_input, nn.Parameter(torch.randn(4, 4, 3, 3).double())
        if wrong.params is not None and wrong.desc != "": continue
        with pytest.raises(error.error_type):
            rep_optimizer(cls)([("weight", p)], **wrong.kwargs, scales=Scales({"weight": dict(conv=torch.ones(4))}))


# --- search copies of nets as people write them

class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, (w - w.mean((1, 2, 3), keepdim=True))/w.std((1, 2, 3), keepdim=True), self.bias)


class Inside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias): return super()._conv_forward(2*x, weight, bias)


def hooked():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.register_forward_hook(lambda m, x, y: 2*y)
    return conv


def replaced():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.forward = lambda x: nn.Conv2d.forward(conv, 2*x)
    return conv


def parametrized_bias():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    nn.utils.parametrize.register_parametrization(conv, "bias", nn.Tanh())
    return conv


OTHERS = dict(standardised=lambda: Standardised(8, 8, 3, padding=1), inside=lambda: Inside(8, 8, 3, padding=1),
              hooked=hooked, replaced=replaced, bias=parametrized_bias, transposed=lambda: nn.ConvTranspose2d(8, 8, 3),
              weight_norm=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
              spectral=lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)))


def around(other):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), other, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_search_copy_leaves_what_is_no_plain_convolution(other):
    torch.manual_seed(0)
    model = around(other()).double()
    with pytest.warns(UserWarning, match="1 of 2 convs have no Hyper-Search block"): hs = to_hyper_search(model)
    assert isinstance(hs[0], CSLA) and not any(isinstance(m, CSLA) for m in hs[1].modules())
    found = extract_scales(hs)
    opt = RepSGD(model.named_parameters(), lr=.01, scales=found, plain=hs.plain)
    model(torch.randn(2, 3, 6, 6).double()).square().mean().backward()
    opt.step()


def test_the_doctor_sees_a_copy_that_is_another_net():
    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 6, 6), torch.randint(5, (4,))) for _ in range(3)]
    for conv, exact in ((nn.Conv2d(8, 8, 3, padding=1), True), (Standardised(8, 8, 3, padding=1), False)):
        model = around(conv)
        r = check_equivalence(model, Scales.initial(model), lambda ps, s: RepSGD(ps, lr=.01, scales=s), data)
        assert r["exact"] is exact and max(r["deviation"].values()) <= 1e-12, r["verdict"]
        assert (r["search"] < 1e-12) is exact


def test_the_doctor_does_not_compare_a_class_with_itself():
    "Explicit branches whose step is wrong are found out"
    Right = rep_optimizer(torch.optim.SGD, "explicit")
    class Wrong(Right):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad(): self.param_groups[0]["params"][0].mul_(1 + 1e-6)
    for cls, exact in ((Right, True), (Wrong, False)):
        r = check_equivalence(net(), some_scales(net()), lambda ps, s: cls(ps, lr=.01, scales=s), batches(3))
        assert r["exact"] is exact, r["verdict"]


class Wild(nn.Module):
    def forward(self, x): return torch.sin(3e3*x)


def test_the_doctor_cannot_tell_where_rounding_explains_all():
    "In a net that magnifies rounding an exact rule and an inexact one are alike; without that part they are told apart"
    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 6, 6), torch.randint(5, (4,))) for _ in range(6)]
    for middle, verdicts in ((Wild(), (None, None)), (nn.Tanh(), (True, False))):
        model = around(middle)
        model.insert(2, nn.Conv2d(8, 8, 3, padding=1))
        make = lambda form: lambda ps, s: RepAdamW(ps, lr=.1, eps=1e-4, scales=s, eps_form=form)
        found = [check_equivalence(model, Scales.initial(model), make(form), data) for form in ("branch", "sum")]
        assert tuple(r["exact"] for r in found) == verdicts, [r["verdict"] for r in found]
        assert all(r["verdict"].startswith("cannot tell") == (r["exact"] is None) for r in found)


@pytest.mark.filterwarnings("ignore:.*convs have no Hyper-Search block")
@pytest.mark.parametrize("name,size",
                         [("edgenext_xx_small", 64), ("resnetv2_50d_gn", 64), ("tf_efficientnet_lite0", 32),
                                       ("test_convnext", 32), ("test_byobnet", 32)])
def test_timm_nets_are_searched_as_they_are(name, size):
    "A few layers of each kind: subclasses of Conv2d, kernels read by the net, 4-d parameters of no conv"
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    hs, x = to_hyper_search(model), torch.randn(2, 3, size, size)
    with torch.no_grad():
        for n, m in hs.named_modules():
            if isinstance(m, CSLA): model.get_submodule(n).weight.copy_(m.weight)
    model.eval(), hs.eval()
    assert float((hs(x) - model(x)).norm()/model(x).norm()) <= 1e-4
    RepSGD(model.named_parameters(), lr=.01, scales=extract_scales(hs), plain=hs.plain)
