"""Files as others publish them: read without running anything, renamed, and held against nets that compute the same.

RepVGG's strided branch."""
import os, subprocess, sys
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from repopt import published
from repopt.lab import checkpoint
from repopt.models import create_model
from repopt.optim import RepSGD
from repopt.scales import Scales, check_fit, own_names, read_scales
from repopt.lab.recipes import Recipe
from repopt.lab.training import load_weights

SCALES = os.environ.get("REPOPT_RELEASED")


def some(model):
    "`model` with norms that have seen something"
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var): t.uniform_(.5, 1.5)
            for t in (m.bias.data, m.running_mean): t.normal_(std=.2)
    return model.eval()


@pytest.mark.parametrize("deployed", [False, True])
def test_timms_repvgg_goes_in_and_computes_the_same(tmp_path, deployed):
    theirs = some(timm.create_model("repvgg_a0", num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): want = theirs(x)
    if deployed: theirs = timm.utils.reparameterize_model(theirs)
    torch.save(theirs.state_dict(), tmp_path/"w.pth")
    ours = load_weights(tmp_path/"w.pth",
                        Recipe.load("imagenet", num_classes=10, model="repoptvgg_a0", compile=False, precision="fp32",
                                    channels_last=False), "repvgg_a0")
    with torch.no_grad(): assert (ours(x) - want).norm() <= 1e-5*want.norm()


def test_repvggs_own_names_go_in(tmp_path):
    ours = some(create_model("repvgg_a0", num_classes=10))
    rules = ((".conv3.0.", ".rbr_dense.conv."), (".conv3.1.", ".rbr_dense.bn."), (".conv1.0.", ".rbr_1x1.conv."),
             (".conv1.1.", ".rbr_1x1.bn."), (".identity.", ".rbr_identity."))
    def theirs(name):
        for a, b in rules: name = name.replace(a, b)
        return name
    torch.save({theirs(k): v for k, v in ours.state_dict().items()}, tmp_path/"w.pth")
    got = load_weights(tmp_path/"w.pth",
                       Recipe.load("imagenet", num_classes=10, compile=False, precision="fp32", channels_last=False),
                       "repvgg_a0")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(got(x), ours(x))


# --- layouts: each small net below computes by itself, under the names of the repository that it stands for

class Theirs(nn.Module):
    "A module made of the parts that it is given, under these names"
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items(): self.add_module(name, part)

    def has(self, name): return name in self._modules


def conv(cin, cout, kernel=3, stride=1, groups=1, bias=False):
    return nn.Conv2d(cin, cout, kernel, stride, kernel//2, groups=groups, bias=bias)


class Factor(Theirs):
    "A factor for each channel"
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x): return torch.einsum("nchw,c->nchw", x, self.weight)


class Gate(Theirs):
    "Channels times a gate, through two 1×1 convs of these names"
    def __init__(self, channels, hidden, names, squash):
        pair = conv(channels, hidden, 1, bias=True), conv(hidden, channels, 1, bias=True)
        super().__init__(**dict(zip(names, pair)))
        self.names, self.squash = names, squash

    def forward(self, x):
        first, second = map(self.get_submodule, self.names)
        return x*self.squash(second(first(x.mean((2, 3), keepdim=True)).relu()))


class VGGBlock(Theirs):
    """RepOptimizers' block as `target`, as `repvgg`, or as `csla` and `hs`, whose names are the same;
    RepVGG's own as `rbr`, and as `deployed`."""
    def __init__(self, cin, cout, stride, kind, se):
        same, norm = cin == cout and stride == 1, lambda: nn.BatchNorm2d(cout)
        if kind == "target": parts = dict(conv=conv(cin, cout, 3, stride), bn=norm())
        elif kind == "repvgg":
            parts = dict(conv_3x3=conv(cin, cout, 3, stride), bn_3x3=norm())
            parts |= dict(conv_1x1=conv(cin, cout, 1, stride), bn_1x1=norm())
            if same: parts["bn_identity"] = norm()
        elif kind == "rbr":
            named = lambda kernel: nn.Sequential(OrderedDict(conv=conv(cin, cout, kernel, stride), bn=norm()))
            parts = dict(rbr_dense=named(3), rbr_1x1=named(1))
            if same: parts["rbr_identity"] = norm()
        elif kind == "deployed": parts = dict(rbr_reparam=conv(cin, cout, 3, stride, bias=True))
        else:
            parts = dict(conv=conv(cin, cout, 3, stride), scale_conv=Factor(cout), bn=norm())
            parts |= dict(conv_1x1=conv(cin, cout, 1, stride), scale_1x1=Factor(cout))
            if same: parts["scale_identity"] = Factor(cout)
        if se: parts["post_se"] = Gate(cout, cout//4, ("down", "up"), torch.sigmoid)
        super().__init__(**parts)

    def forward(self, x):
        if self.has("bn_3x3"):
            y = self.bn_3x3(self.conv_3x3(x)) + self.bn_1x1(self.conv_1x1(x))
            if self.has("bn_identity"): y = y + self.bn_identity(x)
        elif self.has("scale_conv"):
            y = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
            if self.has("scale_identity"): y = y + self.scale_identity(x)
            y = self.bn(y)
        elif self.has("rbr_dense"):
            y = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.has("rbr_identity"): y = y + self.rbr_identity(x)
        elif self.has("rbr_reparam"): y = self.rbr_reparam(x)
        else: y = self.bn(self.conv(x))
        return self.post_se(y.relu()) if self.has("post_se") else y.relu()


def vgg(kind, se=False):
    "RepOptimizers' VGG, or RepVGG, with the depths, channels and strides of our `digits`"
    block = lambda *at: VGGBlock(*at, kind, se)
    parts, cin = dict(stage0=block(3, 16, 1)), 16
    for i, (depth, width, stride) in enumerate(((4, 16, 1), (6, 16, 2), (16, 32, 2), (1, 32, 1)), 1):
        left = [block(width, width, 1) for _ in range(depth - 1)]
        parts[f"stage{i}"] = nn.Sequential(block(cin, width, stride), *left)
        cin = width
    net = Theirs(**parts, linear=nn.Linear(32, 10))
    def forward(x):
        for i in range(5): x = net.get_submodule(f"stage{i}")(x)
        return net.linear(x.mean((2, 3)))
    net.forward = forward
    return net


class Ghost(Theirs):
    "A module of RepGhost's own repository (`fused` or not), or RepOptimizers' as `rep`, `target`, `csla` and `hs`"
    def __init__(self, cin, cout, relu, kind):
        depthwise, norm = conv(cout, cout, groups=cout, bias=kind == "fused"), lambda: nn.BatchNorm2d(cout)
        second = norm() if kind in ("own", "rep") else Factor(cout) if kind in ("csla", "hs") else nn.Identity()
        parts = dict(cheap_operation=depthwise if kind == "fused" else nn.Sequential(depthwise, second))
        if kind == "own": parts |= dict(fusion_bn=nn.Sequential(norm()))
        if kind == "rep": parts |= dict(fusion_bn=norm())
        if kind in ("csla", "hs"): parts |= dict(fusion_scale=Factor(cout))
        if kind in ("csla", "hs", "target"): parts |= dict(final_bn=norm())
        super().__init__(primary_conv=nn.Sequential(conv(cin, cout, 1), norm()), **parts)
        self.relu = relu

    def forward(self, x):
        x = self.primary_conv(x)
        x = x.relu() if self.relu else x
        y = self.cheap_operation(x)
        for beside in ("fusion_bn", "fusion_scale"):
            if self.has(beside): y = y + self.get_submodule(beside)(x)
        if self.has("final_bn"): y = self.final_bn(y)
        return y.relu() if self.relu else y


class GhostBlock(Theirs):
    def __init__(self, cin, hidden, cout, kernel, stride, gated, kind):
        parts = dict(ghost1=Ghost(cin, hidden, True, kind))
        if stride > 1: parts |= dict(conv_dw=conv(hidden, hidden, kernel, stride, hidden), bn_dw=nn.BatchNorm2d(hidden))
        if gated: parts["se"] = Gate(hidden, gated, ("conv_reduce", "conv_expand"), lambda x: ((x + 3)/6).clamp(0, 1))
        parts["ghost2"] = Ghost(hidden, cout, False, kind)
        if (cin, stride) != (cout, 1):
            shrink, widen = conv(cin, cin, kernel, stride, cin), conv(cin, cout, 1)
            parts["shortcut"] = nn.Sequential(shrink, nn.BatchNorm2d(cin), widen, nn.BatchNorm2d(cout))
        super().__init__(**parts)

    def forward(self, x):
        y = self.ghost1(x)
        if self.has("conv_dw"): y = self.bn_dw(self.conv_dw(y))
        if self.has("se"): y = self.se(y)
        return self.ghost2(y) + (self.shortcut(x) if self.has("shortcut") else x)


# of each block: hidden channels, channels, kernel, stride, hidden units of the gate. Our RepGhostNet `digits`
GHOSTS = (((4, 8, 3, 1, 0),),
          ((12, 12, 3, 1, 0),), ((20, 12, 3, 1, 0),),
          ((20, 20, 5, 2, 8),), ((32, 20, 5, 1, 8),),
          ((60, 40, 3, 2, 0),),
          ((52, 40, 3, 1, 0), (60, 40, 3, 1, 0), (60, 40, 3, 1, 0), (120, 56, 3, 1, 32), (168, 56, 3, 1, 44)),
          ((168, 80, 5, 1, 44),), ((240, 80, 5, 1, 0), (240, 80, 5, 1, 60), (240, 80, 5, 1, 0), (240, 80, 5, 1, 60)))


def ghostnet(kind):
    groups, cin = [], 8
    for group in GHOSTS:
        blocks = []
        for hidden, cout, kernel, stride, gated in group:
            blocks.append(GhostBlock(cin, hidden, cout, kernel, stride, gated, kind))
            cin = cout
        groups.append(nn.Sequential(*blocks))
    groups.append(nn.Sequential(last := Theirs(conv=conv(80, 480, 1), bn1=nn.BatchNorm2d(480))))
    last.forward = lambda x: last.bn1(last.conv(x)).relu()
    net = Theirs(conv_stem=conv(3, 8), bn1=nn.BatchNorm2d(8), blocks=nn.Sequential(*groups),
                 conv_head=conv(480, 1280, 1, bias=True), classifier=nn.Linear(1280, 10))
    def forward(x):
        x = net.blocks(net.bn1(net.conv_stem(x)).relu())
        return net.classifier(net.conv_head(x.mean((2, 3), keepdim=True)).relu().flatten(1))
    net.forward = forward
    return net


DIGITS = dict(compile=False, precision="fp32", channels_last=False)
BUILDERS = dict(vgg=vgg, ghostnet=ghostnet)
PUBLISHED = [  # whose layout, their net, ours in which modes
    ("", "vgg target", "repoptvgg_digits"),
    ("RepOpt-VGG's target with SE", "vgg target se", "repoptvgg_digits_se"),
    ("RepOpt-VGG's csla and hs", "vgg csla", "repoptvgg_digits csla hs"),
    ("RepOpt-VGG's csla and hs", "vgg csla se", "repoptvgg_digits_se csla hs"),
    ("RepOptimizers' repvgg", "vgg repvgg", "repvgg_digits"),
    ("RepOptimizers' repvgg", "vgg repvgg se", "repvgg_digits_se"),
    ("RepVGG", "vgg rbr", "repvgg_digits"),
    ("RepVGG", "vgg deployed", "repvgg_digits"),
    ("RepVGG", "vgg deployed", "repoptvgg_digits"),
    ("RepOpt-GhostNet's csla and hs", "ghostnet hs", "repoptghostnet_digits csla hs"),
    ("RepGhostNet, the authors' and timm's", "ghostnet target", "repoptghostnet_digits"),
    ("RepGhostNet, the authors' and timm's", "ghostnet rep", "repghostnet_digits"),
    ("RepGhostNet, the authors' and timm's", "ghostnet own", "repghostnet_digits"),
    ("RepGhostNet, the authors' and timm's", "ghostnet fused", "repghostnet_digits"),
    ("RepGhostNet, the authors' and timm's", "ghostnet fused", "repoptghostnet_digits"),
]


def settled(net, x):
    "`net` with random weights, its norms' statistics near those of `x`: what comes out depends on `x` and on each"
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in () if norms else net.modules():
        if isinstance(m, nn.Conv2d): m.weight.data = nn.init.dirac_(m.weight.data) + .05*torch.randn_like(m.weight)
    for m in norms:
        m.momentum = 1.
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.normal_(m.bias, std=.2)
    with torch.no_grad(): net.train()(x)
    for m in norms:
        m.running_var *= torch.empty_like(m.running_var).uniform_(.5, 1.5)
        m.running_mean += .2*torch.randn_like(m.running_mean)
    return net.eval()


def apart(got, want): return float((got - want).norm()/want.norm())


def digits_weights(path, name, mode="target"):
    return load_weights(path, Recipe.load("digits", **DIGITS), name, mode, in_chans=3)


@pytest.mark.parametrize("whose,net,ours", PUBLISHED)
def test_a_published_net_computes_the_same_under_our_names(tmp_path, whose, net, ours):
    torch.manual_seed(0)
    x, (builder, kind, *se), (name, *modes) = torch.randn(8, 3, 8, 8), net.split(), ours.split()
    theirs = settled(BUILDERS[builder](kind, *map(bool, se)), x)
    assert published.layout(theirs.state_dict()) == whose
    torch.save(dict(model=theirs.state_dict(), epoch=1), tmp_path/"w.pth")
    x = x.double()
    with torch.no_grad():
        got = [digits_weights(tmp_path/"w.pth", name, mode).double()(x) for mode in modes or ["target"]]
        want = theirs.double()(x)
    assert max(apart(y, want) for y in got) <= 1e-6
    assert apart(want, want.mean(0)) > .1                                   # it does see the pictures


def test_every_layout_is_held_against_a_net():
    assert {whose for whose, *_ in PUBLISHED} | {"timm's RepVGG"} == {"", *published.LAYOUTS}


@pytest.mark.parametrize("deployed", [False, True])
def test_timms_repghostnet_goes_in_and_computes_the_same(tmp_path, deployed):
    theirs, x = some(timm.create_model("repghostnet_050", num_classes=10)), torch.randn(2, 3, 64, 64).double()
    if deployed: theirs = timm.utils.reparameterize_model(theirs)
    torch.save(theirs.state_dict(), tmp_path/"w.pth")
    ours = load_weights(tmp_path/"w.pth", Recipe.load("imagenet", num_classes=10, **DIGITS), "repghostnet_050").double()
    with torch.no_grad(): assert apart(ours(x), theirs.double()(x)) <= 1e-6


def half(tensors, stages): return {k: v for k, v in tensors.items() if k[5] in stages}


def gates(): return {f"stage0.se.{k}": v for k, v in Gate(16, 4, ("down", "up"), torch.sigmoid).state_dict().items()}


MIXED = {
    "two layouts": lambda: half(vgg("repvgg").state_dict(), "024") | half(vgg("rbr").state_dict(), "13r"),
    "one weight under two names": lambda: vgg("repvgg").state_dict() | create_model("repvgg_digits").state_dict(),
    "unknown": lambda: {f"backbone.{k}": v for k, v in create_model("repvgg_digits").state_dict().items()},
    "a stage less": lambda: half(vgg("rbr").state_dict(), "0124r"),
    "a bias more": lambda: vgg("rbr").state_dict() | {"stage1.0.rbr_dense.conv.bias": torch.ones(16)},
    "RepVGG's gates, before the ReLU": lambda: vgg("rbr").state_dict() | gates(),
}


@pytest.mark.parametrize("what", MIXED)
def test_a_file_of_mixed_or_unknown_names_is_refused_in_one_line(tmp_path, what):
    torch.save(MIXED[what](), tmp_path/"w.pth")
    with pytest.raises(ValueError, match="names or shapes differ|stands in this file twice") as e:
        digits_weights(tmp_path/"w.pth", "repvgg_digits")
    assert "\n" not in str(e.value)


def script(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read",
                         [published.weights, checkpoint.foreign_weights, Scales.from_released, read_scales, Scales.load,
                          checkpoint.load], ids=lambda f: f.__qualname__)
def test_a_torchscript_archive_is_refused_before_torch_sees_it(tmp_path, read, monkeypatch):
    path = script(tmp_path/"w.pth")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("run"))
    with pytest.raises(ValueError, match="TorchScript archive"): read(path)


@pytest.mark.parametrize("value,why",
                         [(torch.tensor([float("nan")]), "not finite"), (torch.tensor([float("inf")]), "not finite"),
                          (torch.tensor([1]), "int64"), (torch.tensor([1j]), "complex64")])
def test_weights_that_can_be_none_are_refused(tmp_path, value, why):
    torch.save({"w": value}, tmp_path/"w.pth")
    with pytest.raises(ValueError, match=why): published.weights(tmp_path/"w.pth")


@pytest.mark.parametrize("read", [published.weights, Scales.load, read_scales, Scales.from_released],
                         ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("name,data",
                         [("missing.pth", None), ("empty.safetensors", b""),
                          ("words.safetensors", b"words that are none"), ("words.pth", b"words"),
                          ("folder.pth", "folder"),
                                       ("cut.safetensors", b"\xff\0\0\0\0\0\0\0{")])
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, read, name, data):
    path = tmp_path/name
    if data == "folder": path.mkdir()
    elif data is not None: path.write_bytes(data)
    with pytest.raises(ValueError, match=name) as e: read(path)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not SCALES, reason="$REPOPT_RELEASED names no folder of the authors' files")
def test_the_authors_scales_go_in_and_come_out_as_ours(tmp_path):
    theirs = os.path.join(SCALES, "RepOpt-VGG-B1-scales.pth")
    r = subprocess.run([sys.executable, "-m", "repopt", "scales", "convert", theirs, str(tmp_path/"b1.safetensors"),
                        "--arch", "repoptvgg_b1"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert Scales.load(tmp_path/"b1.safetensors").hash == read_scales(theirs).hash == Scales.from_released(theirs).hash


# --- names

def test_names_that_become_one_are_told_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.module = nn.Conv2d(2, 2, 3), nn.Sequential()
            self.module.conv = nn.Conv2d(2, 2, 3)
    net = Net()
    scales = Scales({n: dict(conv=torch.full((2,), v)) for n, v in (("conv.weight", 1.), ("module.conv.weight", 3.))})
    opt = RepSGD(net.named_parameters(), lr=1., scales=scales)
    before = [p.detach().clone() for p in (net.conv.weight, net.module.conv.weight)]
    for p in net.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    assert [float((b - p).mean()) for b, p in zip(before,
                                                  (net.conv.weight, net.module.conv.weight))] == pytest.approx(
                                                      [1, 9], rel=1e-5)


@pytest.mark.parametrize("wrap",
                         [lambda n: f"module.{n}", lambda n: f"module._orig_mod.{n}", lambda n: f"_forward_module.{n}",
                          lambda n: n.replace(".", "._orig_mod.", 1), lambda n: f"_fsdp_wrapped_module.{n}"])
def test_prefixes_of_wrappers_are_looked_through(wrap):
    names = ["stage1.0.conv.weight", "stage1.1.conv.weight", "linear.weight"]
    scales = {n: None for n in names[:2]}
    assert own_names([wrap(n) for n in names], scales) == {wrap(n): n for n in names}


def test_one_prefix_is_said_as_one():
    net = nn.Sequential()
    net.backbone = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="have the prefix 'backbone.'"):
        check_fit(Scales({f"{i}.weight": dict(conv=torch.ones(2)) for i in (0, 1)}), net.named_parameters())


# --- checkpoints

@pytest.mark.parametrize("spoil", ["damaged", "newer", "lacking"])
def test_no_usable_checkpoint_is_an_error_and_nothing_is_removed(tmp_path, spoil):
    state = dict(model={}, optimizer={}, position={}, asked=dict(seed=0))
    for n in (1, 2):
        checkpoint.save(tmp_path/f"step-{n}.pt",
                        {k: v for k, v in state.items() if not (spoil == "lacking" and k == "optimizer")})
        if spoil == "damaged": (tmp_path/f"step-{n}.pt").write_bytes(b"words")
    if spoil == "newer":
        import hashlib, io
        for n in (1, 2):
            torch.save({**state, "format": 99}, b := io.BytesIO())
            (tmp_path/f"step-{n}.pt").write_bytes(b.getvalue())
            (tmp_path/f"step-{n}.sha256").write_text(hashlib.sha256(b.getvalue()).hexdigest())
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(checkpoint.CheckpointError, match="--restart"): checkpoint.load_latest(tmp_path, dict(seed=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == before and len(before) == 4


# --- RepVGG's strided 1×1 on CPUs without AVX-512

STRIDED = """
import copy, torch
from repopt.models import RepVGGBlock
torch.manual_seed(0)
for channels in (2, 3, 5, 7, 16):
    block = RepVGGBlock(channels, 8, 2).train()
    x = torch.randn(4, channels, 9, 9).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(block).double()
    block.to(memory_format=torch.channels_last)
    for net, y in ((block, x), (exact, x.double())): net(y).square().sum().backward()
    for p, q in zip(block.parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-4*q.grad.norm(), channels
"""

@pytest.mark.parametrize("isa", [{}, dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")],
                         ids=["as it is", "avx2"])
@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_strided_branch_has_the_gradient_of_float64(isa, threads):
    r = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True,
                       env={**os.environ, **isa, "OMP_NUM_THREADS": threads})
    assert r.returncode == 0, r.stderr[-800:]
