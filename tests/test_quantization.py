"""INT8 of nets as users have them, of batches as loaders give them, and of files that are judged by what they
compute."""
import copy, io, json, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from repopt import deployment, quantization
from repopt.lab import int8, records
from repopt.deployment import chance, export_int8
from repopt.quantization import QuantizationError, quantize, quantize_aware

torch.manual_seed(0)
IMAGES = torch.rand(64, 3, 32, 32)
LABELS = torch.randint(10, (64,))


def small(*middle):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10)).eval()


class Functional(nn.Module):
    "ReLU and addition as functions and in place, a norm that follows no conv"
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(8, 10)
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        y = F.relu(self.a(self.norm(x)), inplace=True)
        y += self.b(y)
        return self.head(y.relu_().mean((2, 3)))


NETS = dict(resnet18=lambda: torchvision.models.resnet18(num_classes=10),
            mobilenet=lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=.25),
            sequential=lambda: small(nn.BatchNorm2d(8), nn.ReLU()), plain=lambda: small(nn.ReLU(inplace=True)),
            functional=Functional, linear=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 16), nn.ReLU(),
                                                                nn.Linear(16, 10)))


def settled(net):
    "`net` with the statistics of IMAGES in its batch norms, so that tuning on them leaves it where it is"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None
        if isinstance(m, nn.Dropout): m.p = 0.
    for _ in range(2): net.train()(IMAGES)
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_users_nets_become_int8_and_compute_what_they_did(name):
    torch.manual_seed(1)
    net = settled(NETS[name]())
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad(): want = net(IMAGES)
    made = [quantize(net, IMAGES)] + ([quantize_aware(net, [(IMAGES, LABELS)], epochs=1, lr=1e-6)]
                                      if name in ("resnet18", "mobilenet", "functional") else [])
    for got in (q(IMAGES) for q in made):
        assert F.cosine_similarity(got.flatten(), want.flatten(), 0) > .6, name
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_resnet50_too():
    net = torchvision.models.resnet50(num_classes=10).eval()
    with torch.no_grad(): want = net(IMAGES)
    assert (quantize(net, IMAGES)(IMAGES) - want).norm() < .35*want.norm()


def batches(kind):
    return dict(tensor=IMAGES, ones=[(x[None], y[None]) for x, y in zip(IMAGES, LABELS)],
                dicts=[dict(pixel_values=IMAGES, labels=LABELS)], double=[(IMAGES.double(), LABELS)],
                no_labels=[(IMAGES, None)], images=[IMAGES[:32], IMAGES[32:]],
                ragged=[(IMAGES[:63], LABELS[:63]), (IMAGES[63:], LABELS[63:])])[kind]


@pytest.mark.parametrize("kind", ["tensor", "ones", "dicts", "double", "no_labels", "images", "ragged"])
def test_batches_as_loaders_give_them(kind):
    net = small(nn.BatchNorm2d(8), nn.ReLU())
    want = quantize(net, IMAGES)(IMAGES)
    assert (quantize(net, batches(kind))(IMAGES) - want).norm() < .02*want.norm()
    if kind == "ragged": quantize_aware(net, batches(kind), epochs=1)(IMAGES)


@pytest.mark.parametrize("loader,why",
                         [(None, "must be batches"), ("train", "must be batches"), ([None], "a batch must be"),
                          ([(LABELS, LABELS)], "a batch must be"),
                          ([dict(a=IMAGES, b=IMAGES)], "2 floating-point tensors"),
                          ([IMAGES[:32], IMAGES[:32, :, :16]], "several sizes"),
                          ([IMAGES[:8]], "too few"), (IMAGES*float("nan"), "not finite")])
def test_batches_that_mean_nothing_are_refused(loader, why):
    with pytest.raises(QuantizationError, match=why): quantize(small(), loader)


@pytest.mark.parametrize("net,why",
                         [(lambda: small().double(), "call .float"),
                          (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()).eval(), "no conv and no linear|not logits"),
                          (lambda: nn.Conv2d(3, 8, 3).eval(), "not logits"), (lambda: "net", "takes a net"),
                          (lambda: small().train(), "call .eval")])
def test_nets_that_cannot_be_int8_are_refused(net, why):
    with pytest.raises(QuantizationError, match=why): quantize(net(), IMAGES)


def test_weights_that_are_not_finite_are_refused_by_name():
    net = small()
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    for make in (quantize, lambda n, x: quantize_aware(n, [(x, LABELS)])):
        with pytest.raises(QuantizationError, match="not finite.*0.weight"): make(net, IMAGES)


def test_an_int8_net_says_which_images_it_takes_and_survives_copies():
    q = quantize(small(nn.ReLU()), IMAGES)
    for x in (IMAGES[:, :, :16], IMAGES.byte(), None):
        with pytest.raises(QuantizationError, match="takes floating-point images"): q(x)
    want = q(IMAGES)
    assert torch.equal(q(IMAGES.double()), want) and torch.equal(copy.deepcopy(q)(IMAGES), want)
    assert torch.allclose(q(IMAGES[:1]), want[:1], atol=1e-6)
    torch.save(q.state_dict(), io.BytesIO())
    with pytest.raises(QuantizationError, match="export_int8"): torch.save(q, io.BytesIO())


def test_a_file_is_judged_by_pairs_and_by_logits(tmp_path, monkeypatch):
    "Two of 397 images lost are chance, twenty are not; better answers are welcome; logits far apart are not"
    q = quantize(small(nn.ReLU()), IMAGES)
    n = 397
    logits = torch.zeros(n, 10)
    logits[:, 0] = 1
    labels = torch.zeros(n, dtype=torch.long)
    def judged(lost=0, won=0, factor=1.):
        mine, theirs = logits.clone(), logits*factor
        mine[:won, 1], theirs[n - lost:, 1] = 1.01, 1.01
        monkeypatch.setattr(quantization.Quantized, "forward", lambda self, x: mine)
        monkeypatch.setattr(deployment, "onnx_session", lambda path, threads=None: lambda x: theirs.numpy())
        return export_int8(q, tmp_path/"net.onnx", [(torch.rand(n, 3, 32, 32), labels)])
    for good in (dict(lost=2), dict(won=2), dict(lost=1, won=1)):
        found = judged(**good)
        assert (found["worse"], found["better"]) == (good.get("lost", 0), good.get("won", 0))
        assert Path(found["path"]).exists()
        Path(found["path"]).unlink()
    for bad in (dict(lost=20), dict(factor=1.2), dict(factor=float("nan"))):
        with pytest.raises(QuantizationError, match="nothing written"): judged(**bad)
    assert not list(tmp_path.iterdir())


def test_chance_is_mcnemars_exact_test():
    from scipy.stats import binomtest
    for better, worse in ((0, 0), (0, 9), (0, 10), (3, 17), (8, 2)):
        n = better + worse
        assert abs(chance(better, worse) - (binomtest(better, n, alternative="less").pvalue if n else 1)) < 1e-12


def test_one_seed_gives_no_verdict():
    stages = ("before fusing BN", "after fusing BN", "after branch addition", "kernel", "kernel, BN folded")
    spread = dict(overall=1., central=1., surrounding=1., max_over_std=1.)
    record = dict(metrics=dict(layers={stage: {int8.SAMPLED: spread} for stage in stages}))
    assert {r["verdict"] for r in int8.observations([record], [record])} == {"one seed: none"}
    assert {r["verdict"] for r in int8.observations([record]*2, [record]*2)} <= {"holds", "refuted", "mixed"}


@pytest.mark.parametrize("argv,why", [
    ("", "nothing to do"), ("--runs nosuch", "unknown finished run 'nosuch'"), ("--runs .", "unknown finished run"),
    ("--runs ../runs", "unknown finished run"), ("--runs 0123456789", "a Hyper-Search"),
    ("--runs broken0000", "record.json is not a record"), ("--speed b1 --size -3", "--size -3"),
    ("--runs a --qat-rate nan", "--qat-rate nan"), ("--runs a --out /proc/x", "--out"), ("--nosuch", "nosuch"),
    ("--speed repoptvgg_z9", "z9")])
def test_the_command_line_refuses_in_one_line(argv, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REPOPT_BUILD", str(tmp_path))
    search = records.make_record("search", dict(mode="hs", model="repoptvgg_digits"), dict(top1=50.))
    for name, text in {"0123456789": json.dumps(search), "broken0000": "{"}.items():
        (tmp_path/"runs"/name).mkdir(parents=True)
        (tmp_path/"runs"/name/"record.json").write_text(text)
    code, (_, err) = int8.main(argv.split()), capsys.readouterr()
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and why in err, err


def test_a_missing_package_is_named(tmp_path):
    code = ("import sys; sys.modules['torchao'] = None\nfrom repopt.lab.int8 import main\nsys.exit(main(['--speed', "
            "'repoptvgg_a0']))")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 2 and "pip install torchao" in r.stderr and "Traceback" not in r.stderr, r.stderr
