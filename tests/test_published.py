"""Files as others publish them: read without running anything, renamed, and held against nets that compute the same; RepVGG's strided branch."""
import os, subprocess, sys, zipfile

import pytest
import timm
import torch
from torch import nn

from repopt import checkpoint, published
from repopt.models import create_model
from repopt.optim import RepSGD
from repopt.scales import Scales, check_fit, own_names, read_scales
from repopt.training import Recipe, load_weights

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
    ours = load_weights(tmp_path/"w.pth", Recipe.load("imagenet", num_classes=10, model="repoptvgg_a0", compile=False, precision="fp32", channels_last=False), "repvgg_a0")
    with torch.no_grad(): assert (ours(x) - want).norm() <= 1e-5*want.norm()


def test_repvggs_own_names_go_in(tmp_path):
    ours = some(create_model("repvgg_a0", num_classes=10))
    rules = ((".conv3.0.", ".rbr_dense.conv."), (".conv3.1.", ".rbr_dense.bn."), (".conv1.0.", ".rbr_1x1.conv."), (".conv1.1.", ".rbr_1x1.bn."), (".identity.", ".rbr_identity."))
    def theirs(name):
        for a, b in rules: name = name.replace(a, b)
        return name
    torch.save({theirs(k): v for k, v in ours.state_dict().items()}, tmp_path/"w.pth")
    got = load_weights(tmp_path/"w.pth", Recipe.load("imagenet", num_classes=10, compile=False, precision="fp32", channels_last=False), "repvgg_a0")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(got(x), ours(x))


def script(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [published.weights, checkpoint.foreign_weights, Scales.from_released, read_scales, Scales.load, checkpoint.load], ids=lambda f: f.__qualname__)
def test_a_torchscript_archive_is_refused_before_torch_sees_it(tmp_path, read, monkeypatch):
    path = script(tmp_path/"w.pth")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("run"))
    with pytest.raises(ValueError, match="TorchScript archive"): read(path)


@pytest.mark.parametrize("value,why", [(torch.tensor([float("nan")]), "not finite"), (torch.tensor([float("inf")]), "not finite"), (torch.tensor([1]), "int64"), (torch.tensor([1j]), "complex64")])
def test_weights_that_can_be_none_are_refused(tmp_path, value, why):
    torch.save({"w": value}, tmp_path/"w.pth")
    with pytest.raises(ValueError, match=why): published.weights(tmp_path/"w.pth")


@pytest.mark.parametrize("read", [published.weights, Scales.load, read_scales, Scales.from_released], ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("name,data", [("missing.pth", None), ("empty.safetensors", b""), ("words.safetensors", b"words that are none"), ("words.pth", b"words"), ("folder.pth", "folder"),
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
    r = subprocess.run([sys.executable, "-m", "repopt.scales", "convert", theirs, str(tmp_path/"b1.safetensors"), "--arch", "repoptvgg_b1"], capture_output=True, text=True)
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
    assert [float((b - p).mean()) for b, p in zip(before, (net.conv.weight, net.module.conv.weight))] == pytest.approx([1, 9], rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda n: f"module.{n}", lambda n: f"module._orig_mod.{n}", lambda n: f"_forward_module.{n}", lambda n: n.replace(".", "._orig_mod.", 1), lambda n: f"_fsdp_wrapped_module.{n}"])
def test_prefixes_of_wrappers_are_looked_through(wrap):
    names = ["stage1.0.conv.weight", "stage1.1.conv.weight", "linear.weight"]
    scales = {n: None for n in names[:2]}
    assert own_names([wrap(n) for n in names], scales) == {wrap(n): n for n in names}


def test_one_prefix_is_said_as_one():
    net = nn.Sequential()
    net.backbone = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="have the prefix 'backbone.'"): check_fit(Scales({f"{i}.weight": dict(conv=torch.ones(2)) for i in (0, 1)}), net.named_parameters())


# --- checkpoints

@pytest.mark.parametrize("spoil", ["damaged", "newer", "lacking"])
def test_no_usable_checkpoint_is_an_error_and_nothing_is_removed(tmp_path, spoil):
    state = dict(model={}, optimizer={}, position={}, asked=dict(seed=0))
    for n in (1, 2):
        checkpoint.save(tmp_path/f"step-{n}.pt", {k: v for k, v in state.items() if not (spoil == "lacking" and k == "optimizer")})
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
    for net, y in ((block.to(memory_format=torch.channels_last), x), (exact, x.double())): net(y).square().sum().backward()
    for p, q in zip(block.parameters(), exact.parameters()): assert (p.grad - q.grad).norm() <= 1e-4*q.grad.norm(), channels
"""

@pytest.mark.parametrize("isa", [{}, dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")], ids=["as it is", "avx2"])
@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_strided_branch_has_the_gradient_of_float64(isa, threads):
    r = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True, env={**os.environ, **isa, "OMP_NUM_THREADS": threads})
    assert r.returncode == 0, r.stderr[-800:]
