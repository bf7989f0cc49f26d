"""What an optimizer must not do in silence: each case beside branches that are written out, or explicit, over every
rule."""
import copy, pickle, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import (register_optimizer_step_post_hook as after_all,
                                   register_optimizer_step_pre_hook as before_all)

from repopt.groups import param_groups
from repopt.optim import RepAdam, RepAdamW, RepSGD, attach, rep_optimizer
from repopt.rules import RULES
from repopt.grad_mult import GradMult
from repopt.scales import Scales

SGD = dict(lr=.05, momentum=.9, nesterov=True)



class Attached:
    "`attach`, called as the other classes are"
    def __init__(self, torch_class): self.torch_class, self.__name__ = torch_class, f"attached {torch_class.__name__}"

    def __call__(self, params, *, scales, **kw):
        opt = self.torch_class(params, **kw)
        attach(opt, scales)
        return opt


ALL = [rep_optimizer(c) for c in RULES] + [rep_optimizer(torch.optim.Adafactor),
                                           rep_optimizer(torch.optim.SGD, "explicit"),
                                           rep_optimizer(torch.optim.Adam, "update"),
                                           rep_optimizer(torch.optim.SGD, "gradient"), Attached(torch.optim.SGD),
                                           Attached(torch.optim.ASGD)]
every = pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, bias=False)).double()


def some_scales(model, seed=1):
    torch.manual_seed(seed)
    return Scales({p: {b: torch.randn(len(v), dtype=torch.float64) for b, v in bs.items()}
                   for p, bs in Scales.initial(model).items()})


def step(model, opt, seed=0, closure=False):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    def backward():
        opt.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        return loss
    if closure: return opt.step(backward)
    backward()
    opt.step()


def same(cls):
    "torch's NAdam keeps a product in float32, and in float64 once it is loaded"
    return 1e-9 if "NAdam" in cls.__name__ else 1e-14


@torch.no_grad()
def far(a, b): return max(float((p - q).norm()/q.norm()) for p, q in zip(a.parameters(), b.parameters()))


# --- state by name

@every
def test_state_is_joined_by_name_whatever_the_order(cls):
    a, b = net(), net()
    scales = some_scales(a)
    one, two = cls(a.named_parameters(), lr=.01, scales=scales), cls(list(b.named_parameters())[::-1], lr=.01,
                                                                     scales=scales)
    for i in range(3): step(a, one, i)
    b.load_state_dict(a.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for i in range(3, 6):
        step(a, one, i)
        step(b, two, i)
    assert far(b, a) <= same(cls)


@every
def test_state_of_other_names_groups_or_none_is_refused(cls):
    a = net()
    scales = some_scales(a)
    opt = cls(a.named_parameters(), lr=.01, scales=scales)
    step(a, opt)
    before = copy.deepcopy(opt.state_dict())
    for spoil in (lambda g: g[0]["param_names"].__setitem__(1, "0.other"), lambda g: [x.pop("param_names") for x in g],
                  lambda g: g.append({**g[0], "params": g[0]["params"][2:], "param_names": g[0]["param_names"][2:]})):
        wrong = copy.deepcopy(before)
        spoil(wrong["param_groups"])
        with pytest.raises(ValueError, match="state_dict"): opt.load_state_dict(wrong)
    assert str(opt.state_dict()) == str(before)


def test_a_set_of_parameters_is_refused_as_by_torch():
    a = net()
    for params in (set(a.named_parameters()), [dict(params=set(a.named_parameters()))]):
        with pytest.raises(TypeError, match="ordered"): RepSGD(params, scales=some_scales(a))


@every
@pytest.mark.parametrize("flatten", [False, True])
def test_torchs_distributed_checkpoint_keeps_scales_and_branches(cls, flatten):
    a, b = net(), net()
    options, scales = StateDictOptions(flatten_optimizer_state_dict=flatten), some_scales(a)
    one, two = cls(a.named_parameters(), lr=.01, scales=scales), cls(list(b.named_parameters())[::-1], lr=.01,
                                                                     scales=scales)
    for i in range(2): step(a, one, i)
    saved = get_optimizer_state_dict(a, one, options=options)
    set_optimizer_state_dict(b, two, copy.deepcopy(saved), options=options)
    b.load_state_dict(a.state_dict())
    for i in range(2, 4):
        step(a, one, i)
        step(b, two, i)
    assert far(b, a) <= same(cls)
    other = cls(b.named_parameters(), lr=.01, scales=some_scales(a, 2))
    with pytest.raises(ValueError, match="other scales"): set_optimizer_state_dict(b, other, saved, options=options)


def foreign(cls):
    "States that an optimizer of `cls` cannot go on with: {what: state_dict}"
    a = net()
    scales = some_scales(a)
    def trained(make, **kw):
        opt = make(a.named_parameters(), scales=scales, lr=.01, **kw)
        step(a, opt)
        return copy.deepcopy(opt.state_dict())
    out = {"nothing": None, "a number": 3, "empty": {}, "the scales alone": dict(scales=scales),
           "plain SGD": torch.optim.SGD(a.named_parameters()).state_dict()}
    makers = dict(sgd=RepSGD, adamw=RepAdamW, rmsprop=rep_optimizer(torch.optim.RMSprop),
                  explicit=rep_optimizer(cls.torch_class, "explicit"))
    out |= {n: trained(m) for n, m in makers.items() if m.__name__ != cls.__name__}
    if cls is not RepSGD: out["branches"] = trained(cls)
    if cls is RepAdamW: out["branches"]["state"][0]["exp_avg"] = torch.zeros(1)
    elif cls is not RepSGD: out["branches"]["state"][0]["conv"]["theta"] = torch.zeros(1)
    return out


@pytest.mark.parametrize("cls", [RepSGD, RepAdamW, rep_optimizer(torch.optim.Adafactor)], ids=lambda c: c.__name__)
def test_the_state_of_another_class_way_or_shape_is_refused_before_anything_changes(cls):
    a = net()
    opt = cls(a.named_parameters(), lr=.01, scales=some_scales(a))
    step(a, opt)
    before = str(opt.state_dict())
    for what, state in foreign(cls).items():
        with pytest.raises(ValueError):
            opt.load_state_dict(state)
            pytest.fail(what)
        assert str(opt.state_dict()) == before, what


def test_explicit_branches_take_the_states_of_versions_that_kept_them_apart():
    a, b = net(), net(5)
    cls, scales = rep_optimizer(torch.optim.Adam, "explicit"), some_scales(a)
    one, two = cls(a.named_parameters(), lr=.01, scales=scales), cls(list(b.named_parameters())[::-1], lr=.01,
                                                                     scales=scales)
    for i in range(2): step(a, one, i)
    old = dict(inner=one.inner.state_dict(),
               thetas={n: {b: t.detach() for b, t in bs.items()} for n, bs in one.thetas.items()},
               scales={n: dict(bs) for n, bs in scales.items()}, param_groups=one.state_dict()["param_groups"])
    b.load_state_dict(a.state_dict())
    two.load_state_dict(copy.deepcopy(old))
    for i in range(2, 4):
        step(a, one, i)
        step(b, two, i)
    assert far(b, a) <= 1e-14


# --- hooks

@every
@pytest.mark.parametrize("closure", [False, True])
def test_hooks_come_once_with_every_gradient_in_place(cls, closure):
    a, raw = net(), {}
    kind = cls.torch_class
    kind([nn.Parameter(torch.ones(2))], lr=.1)  # torch puts hooks around the step of a class when first built
    for p in a.parameters(): p.register_post_accumulate_grad_hook(lambda p: raw.__setitem__(p, p.grad.clone()))
    opt, seen = cls(a.named_parameters(), lr=.01, scales=some_scales(a)), []
    start = [p.detach().clone() for p in a.parameters()]
    def note(when):
        moved = any(not torch.equal(p, q) for p, q in zip(a.parameters(), start))
        seen.append((when, moved, all(p.grad is not None and torch.equal(p.grad, raw[p]) for p in a.parameters())))
    hooks = [opt.register_step_pre_hook(lambda *_: note("before")),
             opt.register_step_post_hook(lambda *_: note("after")), before_all(lambda o, *_: note("globally before")),
             after_all(lambda o, *_: note("globally after"))]
    try: step(a, opt, closure=closure)
    finally:
        for h in hooks: h.remove()
    assert sorted(w for w, *_ in seen) == ["after", "before", "globally after", "globally before"], seen
    assert all(moved == ("after" in when) for when, moved, _ in seen) and all(
        there or (closure and "before" in when) for when, _, there in seen)


# --- attach

@pytest.mark.parametrize("how",
                         ["closure", "deepcopy", "pickle", "hooked schedule", "schedule before", "accelerate",
                          "again after remove"])
def test_an_attached_sgd_is_exact(how):
    a, b = net(), net()
    scales = some_scales(a)
    want, opt = RepSGD(a.named_parameters(), scales=scales, **SGD), torch.optim.SGD(b.named_parameters(), **SGD)
    if how == "schedule before": torch.optim.lr_scheduler.StepLR(opt, 100)
    if how == "accelerate": opt = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare_optimizer(opt)
    handle = attach(opt, scales)
    if how == "again after remove":
        handle.remove()
        assert type(opt) is torch.optim.SGD
        attach(opt, scales)
    if how == "deepcopy": b, opt = copy.deepcopy((b, opt))
    if how == "pickle": b, opt = pickle.loads(pickle.dumps((b, opt)))
    if how == "hooked schedule": torch.optim.lr_scheduler.StepLR(opt, 100)
    for i in range(4):
        step(a, want, i)
        step(b, opt, i, closure=how == "closure")
        assert far(b, a) <= 1e-14
    assert isinstance(getattr(opt, "optimizer", opt), torch.optim.SGD) and all(
        torch.allclose(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))


def test_attach_twice_is_refused_and_remove_gives_plain_sgd_back():
    a, b = net(), net()
    opt, plain = torch.optim.SGD(a.named_parameters(), **SGD), torch.optim.SGD(b.named_parameters(), **SGD)
    handle = attach(opt, some_scales(a))
    with pytest.raises(ValueError, match="scales already"): attach(opt, some_scales(a))
    with pytest.raises(ValueError, match="scales already"):
        attach(RepSGD(a.named_parameters(), scales=some_scales(a)), some_scales(a))
    handle.remove()
    step(a, opt)
    step(b, plain)
    assert far(a, b) == 0


@pytest.mark.parametrize("schedule", [False, True])
def test_an_attached_step_is_exact_when_compiled_and_refused_where_it_was_compiled_before(schedule):
    a, b = net(), net()
    opt, want = torch.optim.SGD(a.named_parameters(), **SGD), RepSGD(b.named_parameters(), scales=some_scales(a), **SGD)
    if schedule: torch.optim.lr_scheduler.StepLR(opt, 100)
    too_early = torch.compile(opt.step)
    attach(opt, some_scales(a))
    compiled = torch.compile(opt.step)
    for i in range(3):
        step(b, want, i)
        torch.manual_seed(i)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        opt.zero_grad()
        F.mse_loss(a(x), x).backward()
        compiled()
        assert far(a, b) <= 1e-14
    if not schedule:
        with pytest.raises(Exception, match="compiled before attach"): too_early()


# --- options that change

COUPLED = [c for c in RULES if c.__name__ in ("Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta")]

@pytest.mark.parametrize("cls", COUPLED, ids=lambda c: c.__name__)
def test_coupled_decay_set_later_or_loaded_is_refused(cls):
    a = net()
    opt = rep_optimizer(cls)(a.named_parameters(), lr=.01, scales=some_scales(a))
    step(a, opt)
    loaded = copy.deepcopy(opt.state_dict())
    loaded["param_groups"][0]["weight_decay"] = .1
    with pytest.raises(ValueError, match="coupled weight_decay is not exact"): opt.load_state_dict(loaded)
    opt.param_groups[0]["weight_decay"] = .1
    before = [p.detach().clone() for p in a.parameters()]
    with pytest.raises(ValueError, match="coupled weight_decay is not exact"): step(a, opt)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before))


@pytest.mark.parametrize("cls,option,value",
                         [(RepSGD, "differentiable", True), (rep_optimizer(torch.optim.NAdam), "capturable", True),
                          (RepAdam, "eps_form", "none"),
                                              (rep_optimizer(torch.optim.RMSprop), "eps_form", "sum"),
                                              (rep_optimizer(torch.optim.Adam, "update"), "differentiable", True),
                                              (rep_optimizer(torch.optim.Adam, "explicit"), "differentiable", True)])
def test_every_option_that_a_constructor_refuses_is_judged_at_the_step(cls, option, value):
    a = net()
    opt = cls(a.named_parameters(), lr=.01, scales=some_scales(a))
    opt.param_groups[0][option] = value
    with pytest.raises(ValueError): step(a, opt)


@pytest.mark.parametrize("option,value",
                         [("weight_decay", .1), ("maximize", True), ("lr", .2), ("momentum", .5), ("nesterov", False),
                          ("dampening", .0)])
def test_options_that_may_change_are_followed_as_the_branches_would(option, value):
    a, b = net(), net()
    opts = [rep_optimizer(torch.optim.SGD, way)(m.named_parameters(), scales=some_scales(a), **SGD)
            for m, way in ((a, None), (b, "explicit"))]
    for i in range(4):
        if i == 2:
            for o in opts: o.param_groups[0][option] = value
        for m, o in zip((a, b), opts): step(m, o, i)
    assert far(a, b) <= 1e-12


def test_an_adamw_whose_decay_is_made_coupled_is_refused():
    a = net()
    opt = RepAdamW(a.named_parameters(), lr=.01, scales=some_scales(a))
    opt.param_groups[0]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match="coupled weight_decay is not exact"): step(a, opt)


@pytest.mark.parametrize("per_group,later", [(.5, None), (None, .5), (None, None)])
def test_adagrads_accumulator_begins_as_torchs_does(per_group, later):
    "torch reads initial_accumulator_value once, of the constructor and not of a group"
    a, b = net(), net()
    groups = lambda m: [dict(params=m.named_parameters(),
                             **({} if per_group is None else dict(initial_accumulator_value=per_group)))]
    opts = [rep_optimizer(torch.optim.Adagrad, way)(groups(m), lr=.1, initial_accumulator_value=.2,
                                                    scales=some_scales(a))
            for m, way in ((a, None), (b, "explicit"))]
    for i in range(4):
        for m, o in zip((a, b), opts):
            if later is not None and i == 2: o.param_groups[0]["initial_accumulator_value"] = later
            step(m, o, i)
    assert far(a, b) <= 1e-12


@pytest.mark.parametrize("decay", ["positional", "by name", "of a group", "later"])
def test_the_update_way_decays_as_it_is_told(decay):
    def moved(how):
        a = net()
        cls, scales = rep_optimizer(torch.optim.Adam, "update"), some_scales(a)
        if how == "positional": opt = cls(a.named_parameters(), .01, (.9, .999), 1e-8, .1, scales=scales)
        elif how == "by name": opt = cls(a.named_parameters(), lr=.01, weight_decay=.1, scales=scales)
        elif how == "of a group": opt = cls([dict(params=a.named_parameters(), weight_decay=.1)], lr=.01, scales=scales)
        else: opt = cls(a.named_parameters(), lr=.01, scales=scales)
        if how == "later": opt.param_groups[0]["weight_decay"] = .1
        step(a, opt)
        return a
    start, plain, a = net(), moved("none"), moved(decay)
    for p, q, w in zip(a.parameters(), plain.parameters(), start.parameters()):
        torch.testing.assert_close(p, q - .01*.1*w, rtol=1e-12, atol=1e-15)
    own = rep_optimizer(torch.optim.AdamW, "update")(start.named_parameters(), scales=some_scales(start))
    assert own.param_groups[0]["weight_decay"] == .01                          # AdamW's own default


def test_groups_that_come_later_have_the_optimizers_eps_form():
    a = net()
    opt = RepAdamW(a.named_parameters(), lr=.01, scales=some_scales(a), eps_form="sum")
    opt.add_param_group(dict(params=[("more", nn.Parameter(torch.ones(3)))]))
    assert opt.param_groups[1]["eps_form"] == "sum"


# --- explicit branches and kernels from outside

@pytest.mark.parametrize("cls", [torch.optim.Adafactor, torch.optim.SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("through_data", [False, True])
def test_a_kernel_put_in_from_outside_is_taken_over(cls, through_data):
    a, b = net(), net(7)
    scales = some_scales(a)
    opt = rep_optimizer(cls, "explicit")(a.named_parameters(), lr=0., weight_decay=0., scales=scales)
    step(a, opt)
    if through_data:
        for p, q in zip(a.parameters(), b.parameters()): p.data.copy_(q.data)
    else: a.load_state_dict(b.state_dict())
    step(a, opt)                                                               # at lr 0 nothing moves
    assert far(a, b) <= 1e-12


def test_explicit_branches_recover_from_a_training_that_diverged():
    a, b = net(), net(7)
    opt = rep_optimizer(torch.optim.SGD, "explicit")(a.named_parameters(), lr=0., scales=some_scales(a))
    with torch.no_grad(): a[0].weight.fill_(float("nan"))
    step(a, opt)
    a.load_state_dict(b.state_dict())
    step(a, opt)
    assert far(a, b) <= 1e-12


def test_explicit_branches_tell_of_a_kernel_that_was_replaced():
    a = net()
    opt = rep_optimizer(torch.optim.Adafactor)(a.named_parameters(), lr=.01, scales=some_scales(a))
    a[0].weight = nn.Parameter(a[0].weight.detach().clone())
    with pytest.warns(UserWarning, match="got no gradient, the first is 0.weight"): step(a, opt)


# --- geometry, against branches written out

def out_of_branches(thetas, alphas):
    "Σ α L θ of conv 3×3, 1×1, 1×3, 3×1, depthwise 3×3, identity, each padded by hand"
    O, C = thetas["conv"].shape[:2]
    W = thetas["conv"]*alphas["conv"].reshape(-1, 1, 1, 1)
    for n, pad in (("conv_1x1", (1, 1, 1, 1)), ("conv_1x3", (0, 0, 1, 1)), ("conv_3x1", (1, 1, 0, 0))):
        if n in thetas: W = W + F.pad(thetas[n], pad)*alphas[n].reshape(-1, 1, 1, 1)
    own = torch.zeros(O, C, dtype=W.dtype)
    own[torch.arange(O), torch.arange(O) % C] = 1
    if "depthwise_3x3" in thetas:
        W = W + own[:, :, None, None]*(thetas["depthwise_3x3"]*alphas["depthwise_3x3"].reshape(-1, 1, 1, 1))
    if "identity" in thetas: W = W + F.pad((own*thetas["identity"].reshape(-1, 1))[:, :, None, None], (1, 1, 1, 1))
    return W


SHAPES = dict(conv=(3, 3), conv_1x1=(1, 1), conv_1x3=(1, 3), conv_3x1=(3, 1), depthwise_3x3=(3, 3))

@pytest.mark.parametrize("extra",
                         [("depthwise_3x3",), ("conv_1x3", "conv_3x1"), ("conv_1x1", "identity"),
                          ("depthwise_3x3", "identity", "conv_1x1"), tuple(SHAPES)[1:] + ("identity",)], ids="+".join)
@pytest.mark.parametrize("cls",
                         [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adamax, torch.optim.Adadelta,
                          torch.optim.RMSprop], ids=lambda c: c.__name__)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_branch_reaches_in_the_optimizer_what_it_reaches_in_the_block(cls, extra, groups):
    torch.manual_seed(3)
    C, names = 4//groups, ("conv", *extra)
    alphas = {n: torch.ones(4, dtype=torch.float64) if n == "identity" else torch.randn(4, dtype=torch.float64)
              for n in names}
    thetas = {n: nn.Parameter(torch.randn((4,) if n == "identity"
                                          else (4, 1 if n.startswith("depth") else C, *SHAPES[n]),
                                          dtype=torch.float64)) for n in names}
    W = nn.Parameter(out_of_branches(thetas, alphas).detach().clone())
    kw = dict(lr=.05) | (dict(momentum=.9) if cls is torch.optim.SGD else {})
    ours, theirs = rep_optimizer(cls)([("w", W)], scales={"w": alphas}, **kw), cls(thetas.values(), **kw)
    for i in range(5):
        torch.manual_seed(i)
        x, y = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        for opt, kernel in ((ours, lambda: W), (theirs, lambda: out_of_branches(thetas, alphas))):
            opt.zero_grad()
            F.mse_loss(F.conv2d(x, kernel(), padding=1, groups=groups), y).backward()
            opt.step()
    want = out_of_branches(thetas, alphas).detach()
    assert (W - want).norm() <= 1e-9*want.norm()


DECAYED = [(torch.optim.SGD, None), (torch.optim.SGD, "gradient"), (torch.optim.SGD, "explicit"),
           (torch.optim.SGD, "attach"), (torch.optim.AdamW, None), (torch.optim.AdamW, "explicit"),
           (torch.optim.ASGD, None), (torch.optim.ASGD, "attach"), (torch.optim.Adam, "update")]

@pytest.mark.parametrize("cls,way", DECAYED, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("branches", [("conv_1x3", "conv_3x1"), ("conv_1x1",), ("identity",), ("conv",)], ids="+".join)
def test_no_decay_takes_from_entries_that_no_branch_moves(cls, way, maximize, branches):
    "Where a block has nothing, or only a scale of 0, the kernel stays as it was; elsewhere it moves"
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64))
    scales = {"w": {b: torch.randn(4, dtype=torch.float64).index_fill_(0, torch.tensor([2]), 0) for b in branches}}
    reached = GradMult(Scales(scales)["w"], W.shape).dense() > 0
    make = Attached(cls) if way == "attach" else rep_optimizer(cls, way)
    opt, start = make([("w", W)], scales=scales, lr=.1, weight_decay=.1, maximize=maximize), W.detach().clone()
    for _ in range(3):
        W.grad = torch.randn_like(W)
        opt.step()
    assert (W - start).abs()[~reached].max() <= 1e-15 and (W != start)[reached].all()


# --- layouts, compile, construction

@pytest.mark.parametrize("conv,layout",
                         [(nn.Conv3d, torch.channels_last_3d), (nn.Conv3d, "transposed"), (nn.Conv2d, "transposed"),
                          (nn.Conv1d, None), (nn.Linear, None)], ids=str)
def test_kernels_in_any_dense_layout(conv, layout):
    make = lambda: (conv(4, 4) if conv is nn.Linear else conv(4, 4, 3, padding=1)).double()
    torch.manual_seed(0)
    a, b = make(), make()
    b.load_state_dict(a.state_dict())
    names = ["conv", "identity"] + ([] if conv is nn.Linear else ["conv_" + "x".join("1"*(a.weight.ndim - 2))])
    if layout == "transposed": a.weight.data = a.weight.data.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout is not None: a = a.to(memory_format=layout)
    scales = {"weight": {n: torch.randn(4, dtype=torch.float64) for n in names}}
    opts = [rep_optimizer(torch.optim.AdamW, way)(m.named_parameters(), scales=scales)
            for m, way in ((a, None), (b, "explicit"))]
    for i in range(3):
        torch.manual_seed(i)
        x = torch.randn(2, 4, *[5]*max(a.weight.ndim - 2, 0), dtype=torch.float64)
        for m, o in zip((a, b), opts):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
    assert far(a, b) <= 1e-9


def test_what_cannot_be_stepped_is_refused_when_it_is_built():
    a = net()
    with pytest.raises(ValueError, match="scales must be"): RepSGD(a.named_parameters(), scales=None)
    with pytest.raises(ValueError, match="no entries"):
        RepSGD([("w", nn.Parameter(torch.empty(0, 4, 3, 3)))], scales={"w": dict(conv=torch.empty(0))})
    w = nn.Parameter(torch.randn(4, 4, 3, 3).transpose(0, 1))
    with pytest.raises(ValueError, match="w: .*contiguous"): RepSGD([("w", w)], scales={"w": dict(conv=torch.ones(4))})
    with pytest.raises(ValueError, match="without 'params'"): RepSGD([dict(lr=.1)], scales=some_scales(a))


w = nn.Parameter(torch.randn(4, 4, 3, 3))
WRONG = {"no parameters": lambda s: RepSGD(None, scales=s),
         "a name that is a number": lambda s: RepSGD([(3, w)], scales={}),
         "a parameter that is a number": lambda s: RepSGD([("w", 3)], scales={}),
         "a group of nothing": lambda s: RepSGD([dict(params=[])], scales={}),
         "integers": lambda s: RepSGD([("i", torch.zeros(3, dtype=torch.long))], scales={}),
         "plain=3": lambda s: RepSGD([("w", w)], scales=s, plain=3),
         "scales of tensors": lambda s: RepSGD([("w", w)], scales={"w": torch.ones(4)}),
         "scales in a word": lambda s: RepSGD([("w", w)], scales="ones"),
         "no input channels": lambda s: RepSGD([("w", nn.Parameter(torch.zeros(4, 0, 3, 3)))], scales=s),
         "a word": lambda s: rep_optimizer("SGD"), "a module": lambda s: rep_optimizer(nn.Linear),
         "nothing": lambda s: rep_optimizer(None), "a RepOptimizer": lambda s: rep_optimizer(RepSGD),
         "attach to nothing": lambda s: attach(None, s),
         "attach nothing": lambda s: attach(torch.optim.SGD([("w", w)]), None),
         "attach what does not fit": lambda s: attach(torch.optim.SGD([("v", w)]), s)}

@pytest.mark.parametrize("what", WRONG)
def test_what_means_nothing_is_one_line(what):
    with pytest.raises(ValueError, match="."): WRONG[what]({"w": dict(conv=torch.ones(4), identity=torch.ones(4))})


def test_a_compiled_step_is_the_step():
    a, b = net(), net()
    one, two = (RepSGD(m.named_parameters(), scales=some_scales(a), **SGD) for m in (a, b))
    compiled = torch.compile(two.step)
    for i in range(3):
        step(a, one, i)
        torch.manual_seed(i)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        two.zero_grad()
        F.mse_loss(b(x), x).backward()
        compiled()
    assert far(a, b) <= 1e-14


# --- groups

def test_groups_decay_kernels_alone_once_and_keep_frozen_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.more, self.gamma = nn.Conv2d(4, 4,
                                                                    3), nn.RMSNorm(4), nn.LayerNorm((
                                                                        4, 4)), nn.Parameter(torch.ones(4))
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.conv.weight.requires_grad_(False)
    m = Net()
    decay, free = param_groups(m, .1)
    assert [n for n, _ in decay["params"]] == ["conv.weight",
                                               "a.weight"] and decay["weight_decay"] == .1 and free["weight_decay"] == 0
    assert {n for n, _ in free["params"]} == {"gamma", "conv.bias", "norm.weight", "more.weight", "more.bias", "a.bias",
                                              "b.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                          # a frozen kernel is no accident
        opt = RepSGD([decay, free], lr=.1, scales=Scales.initial(m))
        m.a(torch.randn(2, 4)).sum().backward()
        opt.step()


# --- tensors without values

@pytest.mark.parametrize("cls", [rep_optimizer(c) for c in RULES], ids=lambda c: c.__name__)
def test_built_over_fake_tensors_the_scales_keep_their_hash(cls):
    "As the prediction of memory builds them: a hash of fake values would be another optimizer's"
    from torch._subclasses.fake_tensor import FakeTensorMode
    scales = some_scales(net())
    want = Scales(dict(scales)).hash
    with FakeTensorMode(allow_non_fake_inputs=True):
        sizes = dict(kernel_size=3, padding=1, dtype=torch.float64)
        a = nn.Sequential(nn.Conv2d(4, 4, **sizes), nn.Tanh(), nn.Conv2d(4, 4, bias=False, **sizes))
        opt = cls(a.named_parameters(), lr=.01, scales=scales)
    assert opt.param_groups[0]["scales_sha256"] == want
