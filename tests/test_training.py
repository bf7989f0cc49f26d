"""What no training run can mean is refused before anything is made, with a line.

And what runs through, does so in the right numbers."""
import json, os, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repopt.lab import cli, recipes, records, runs, training
from repopt.lab.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[1]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def build(tmp_path, monkeypatch):
    "Where runs are made, and the folder that the command is called from: both are to stay empty"
    monkeypatch.setenv("REPOPT_BUILD", str(tmp_path/"build"))
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    return tmp_path/"build"


def said(capsys, *words):
    "The one line that `python -m repopt train` refuses `words` with; nothing was made"
    torch.set_num_threads(1)
    assert cli.train([str(w) for w in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


VALUES = dict(momentum=[2, -.1, 1, "fast"], weight_decay=[-1e-5, NAN], label_smoothing=[-.1, 1, -1, 2],
              warmup_epochs=[-1, INF], lr=[NAN, INF, -INF, 0, -1, "fast", True],
              test_size=[-5, 0, 8.5], bn_batch=[0, -32], clip_norm=[0, -5, NAN], image_size=[0, -8], num_classes=[0],
              batch_size=[0, 2.5, True], lr_batch=[0, -1], epochs=[0, -1, .5], test_epochs=[0],
              ema_decay=[0, 1, -1, NAN], accumulate=[0, -2, 1.5, 3],
              strides=["2,2", [2, 2, 2, 2, 0], [1, 2, 2, 2, -1], "a,b,c,d,e", 2, [1.5]*5],
              nesterov=[1, "yes"], compile=[1, 0, "yes"], channels_last=[1, "no"], schedule=["cosin", 3],
              augment=["flip"], precision=["fp16"], scale_init=["one"], init=["he"],
              identity=["two"], optimizer=[3], model=[3, True], name=["../x", "/abs", "a/b", "", ".x", "x\ny"],
              data=[3])


@pytest.mark.parametrize("key,value", [(k, v) for k, vs in VALUES.items() for v in vs])
def test_values_that_no_run_can_mean_are_refused_when_the_recipe_is_read(key, value):
    with pytest.raises(ValueError, match=key): Recipe.load("digits", **{key: value})


FILES = dict(empty="", list="- 1\n- 2\n", text="hello", number="3", broken="lr: [1, 2", tabs="lr:\t- 1\n\t- 2",
             twice="lr: 0.1\nlr: 0.2\n", object="lr: !!python/object:os.system {}\n", missing="lr: 0.1\n",
             name="<digits>name: ../../x\n", unknown="<digits>learning_rate: 1\n", none="<digits>extra:\n",
             numbers="1: 2\n", bytes=b"\xff\xfe\x00", control="lr: \x01")


@pytest.mark.parametrize("what", FILES)
def test_a_recipe_that_cannot_be_read_is_named(what, tmp_path):
    path, text = tmp_path/"mine.yaml", FILES[what]
    if isinstance(text, bytes): path.write_bytes(text)
    else: path.write_text(text.replace("<digits>", (RECIPES/"digits.yaml").read_text()))
    with pytest.raises(ValueError, match="mine") as e: Recipe.load(path)
    if what in ("broken", "tabs", "twice", "object"): assert "line " in str(e.value), e.value


def test_a_number_with_an_exponent_is_a_number(tmp_path):
    path = tmp_path/"mine.yaml"
    for text in ("1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001", "1.0e-3"):
        path.write_text((RECIPES/"digits.yaml").read_text().replace("lr: 0.1\n", f"lr: {text}\n"))
        assert Recipe.load(path).lr == .001 and cli._overrides([f"lr={text}"]) == dict(lr=.001), text


WORDS = [("--recipe digts", "did you mean 'digits'?"), ("--recipe nosuch.yaml", "nosuch.yaml"),
         ("--recipe ../recipes/digits", "unknown recipe"), ("--recipe .", "unknown recipe"), ("", "--recipe"),
         ("--recipe digits --set lrr=1", "did you mean 'lr'?"), ("--recipe digits --set lr", "KEY=VALUE"),
         ("--recipe digits --set lr=", "must have a value"), ("--recipe digits --set lr=1 --set lr=2", "twice"),
         ("--recipe digits --set lr=[1", "not YAML"), ("--recipe digits --set lr=.nan", "finite"),
         ("--recipe digits --set schedule=cosin", "did you mean 'cosine'?"),
         ("--recipe digits --model x --set model=y", "not the same"),
         ("--recipe digits --model repoptvgg_digit", "repoptvgg_digits"), ("--recipe digits --model vgg16", "vgg16"),
         ("--recipe digits --optimizer repsgdd --scales ones", "did you mean 'repsgd'?"),
         ("--recipe digits --optimizer repsgd", "needs scales"), ("--recipe digits --mode hyper", "mode='hyper'"),
         ("--recipe digits --seed -1", "seed=-1"), ("--recipe digits --seed x", "--seed"),
         ("--recipe digits --gpus 0", "gpus=0"), ("--recipe digits --gpus -2", "gpus=-2"),
         ("--recipe digits --nodes 0", "nodes=0"), ("--recipe digits --nodes 2.5", "--nodes"),
         ("--recipe digits --gpus 3", "shared equally"), ("--recipe digits --save-seconds -1", "save_seconds=-1"),
         ("--recipe digits --save-seconds nan", "save_seconds=nan"),
         ("--recipe digits --out /proc/x", "--out: /proc/x/runs cannot be written to"),
         ("--recipe digits --out /dev/null", "--out: /dev/null"), ("--recipe digits --broken maybe", "--broken"),
         ("--recipe digits --no-such", "--no-such"),
         ("--recipe digits --scales nowhere.safetensors", "nowhere.safetensors"),
         ("--recipe digits --scales all", "all"), ("--recipe cifar --data /nowhere", "/nowhere"),
         ("--recipe digits --weights /nowhere.pth", "/nowhere.pth"),
         ("--recipe digits --set accumulate=3", "accumulate=3"), ("--recipe digits --set strides=1,2", "five"),
         ("--recipe digits --set name=../x", "name='../x'")]


@pytest.mark.parametrize("words,says", WORDS)
def test_a_command_line_that_means_nothing_is_refused_with_one_line_before_anything_is_made(words, says, build, capsys):
    assert says in said(capsys, *words.split())
    assert not list(Path().iterdir()) and not list(build.rglob("*.pt"))


@pytest.mark.parametrize("name,value",
                         [("REPOPT_SAVE_SECONDS", "soon"), ("REPOPT_SAVE_SECONDS", "-1"),
                          ("REPOPT_SAVE_SECONDS", "nan"), ("REPOPT_BUILD", "/proc/x"), ("REPOPT_BUILD", "/dev/null/x")])
def test_an_environment_that_cannot_be_used_is_named(name, value, build, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert name in said(capsys, "--recipe", "digits")


@pytest.mark.parametrize("kw", [dict(seed=1.5), dict(seed="0"), dict(seed=True), dict(gpus=True), dict(nodes="2"),
                                dict(device="tpu9"), dict(mode="Target"), dict(broken="yes"), dict(save_seconds="soon"),
                                dict(reinitialize=True)])
def test_run_refuses_what_it_cannot_be_asked(kw, build):
    with pytest.raises(ValueError, match=next(iter(kw))): runs.run("digits", quiet=True, **kw)
    assert not build.exists()


def test_a_package_that_misses_is_named_with_its_pip_command(build, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in said(capsys, "--recipe", "digits")


def test_keys_that_came_later_do_not_change_the_ids_of_older_runs():
    for r in records.load_all(ROOT/"figures"):
        if r["experiment"] in ("train", "search"):
            had = {**r["asked"]["recipe"], "strides": r["asked"]["recipe"]["strides"]
                   and tuple(r["asked"]["recipe"]["strides"])}
            assert records.run_id({**r["asked"], "recipe": Recipe(**had).asked()}) == r["id"]
    assert "ema_decay" not in Recipe.load("digits").asked() and Recipe.load(
        "digits", ema_decay=.9).asked()["ema_decay"] == .9
    assert recipes.label(Recipe.load("digits", ema_decay=.9)) == "digits, ema_decay=0.9"
    assert recipes.label(Recipe.load("digits")) == "digits"
    assert asdict(Recipe.load("digits", accumulate=2)) | dict(accumulate=1) == asdict(Recipe.load("digits"))


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("clip", [None, .1])
def test_a_batch_in_parts_takes_the_step_of_the_whole(k, clip):
    def ended(parts):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 10)).double()
        opt, recipe = torch.optim.SGD(net.parameters(), .1, momentum=.9), Recipe.load(
            "digits", accumulate=parts, clip_norm=clip)
        losses = [training.train_step(net, opt, torch.randn(64, 1, 8, 8).double(), torch.randint(10, (64,)), recipe)
                  for _ in range(5)]
        return torch.cat([p.detach().flatten() for p in net.parameters()] + [torch.stack(losses)])
    assert (ended(k) - ended(1)).abs().max() <= 1e-12


def test_the_authors_schedule_is_timms():
    from timm.scheduler import CosineLRScheduler
    r, n = Recipe.load("cifar", epochs=12, warmup_epochs=2), 10
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=r.lr)
    theirs, seen = CosineLRScheduler(opt, t_initial=r.epochs*n, lr_min=0, warmup_lr_init=0, warmup_t=r.warmup_epochs*n,
                                     cycle_limit=1, t_in_epochs=False), []
    for step in range(r.epochs*n):
        seen.append(opt.param_groups[0]["lr"])
        theirs.step_update(step)
    assert max(abs(a - recipes.lr_at(r, s, n)) for s, a in enumerate(seen)) < 1e-15


def test_top5_counts_what_is_among_the_five_best():
    class Fixed(nn.Module):
        def forward(self, x): return x.flatten(1)
    torch.manual_seed(0)
    for classes in (3, 5, 6, 20):
        x, y = torch.randn(40, classes, 1, 1), torch.randint(classes, (40,))
        got = training.evaluate(Fixed(), [(x[:25], y[:25]), (x[25:], y[25:])], Recipe.load("digits"))
        want = 100*sum(y[i] in x[i].flatten().argsort(descending=True)[:5] for i in range(40))/40
        assert got.get("top5") == (want if classes > 5 else None)


class Switched:
    "A run in a process of its own, in its own folder"
    def __init__(self, build, *words, **env):
        env = {**os.environ, "REPOPT_BUILD": str(build), "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(Path(training.__file__).parents[2]), **env}
        words = [sys.executable, "-m", "repopt", "train", "--recipe", "digits", "--save-seconds", "0.3", *words]
        self.p, self.build = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                              text=True), build

    def ended(self, code=0):
        out, err = self.p.communicate(timeout=300)
        assert self.p.returncode == code and "Traceback" not in err, (self.p.returncode, out, err)
        return out, err

    def saves(self, n=2):
        seen = set()
        while len(seen) < n and self.p.poll() is None:
            seen |= {f.name for f in self.build.glob("runs/*/step-*.pt")}
            time.sleep(.01)
        return self


def left(build):
    record = next(build.glob("runs/*/record.json"))
    return load_file(next(build.glob("runs/*/final.safetensors"))), json.loads(record.read_text())


SHORT = "--set epochs=8 --set ema_decay=0.9 --set accumulate=2".split()

def test_averages_and_parts_end_in_the_same_bits_after_a_kill_and_after_ctrl_c(tmp_path):
    Switched(tmp_path/"calm", *SHORT).ended()
    run = Switched(tmp_path/"killed", *SHORT).saves(1)
    run.p.kill()
    run.p.communicate()
    run = Switched(tmp_path/"killed", *SHORT)
    assert "goes on from" in run.p.stdout.readline()
    run.p.send_signal(signal.SIGINT)
    assert run.ended(130)[1] == "interrupted\n"
    assert "goes on from" in Switched(tmp_path/"killed", *SHORT).ended()[0]
    (a, one), (b, two) = left(tmp_path/"calm"), left(tmp_path/"killed")
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and one["epochs"] == two["epochs"] and one["id"] == two["id"]
    assert one["metrics"]["top5"] >= one["metrics"]["top1"]


def test_a_search_that_diverges_says_so_in_a_line_whatever_the_compilers_cache(tmp_path):
    words = "--set epochs=1 --mode hs --set lr=1e20 --set warmup_epochs=0".split()
    _, err = Switched(tmp_path, *words, TORCHINDUCTOR_CACHE_DIR="/proc/x").ended(1)
    assert "error: run" in err and "stopped before the update" in err and "/proc/x cannot be written to" in err, err


def test_a_compiler_that_cannot_write_is_gone_on_without(monkeypatch):
    def broken(model, **k):
        def call(x): raise FileNotFoundError(2, "No such file or directory", "/proc/x")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    forward = training.compiled(net, Recipe.load("digits"))
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it") as warned:
        assert torch.equal(forward(x), net(x)) and torch.equal(forward(x), net(x))
    assert len(warned) == 1


def test_a_reader_that_goes_does_not_end_a_run(tmp_path):
    run = Switched(tmp_path, "--set", "epochs=1")
    run.p.stdout.close()
    assert run.p.stderr.read() == "" and run.p.wait() == 0 and left(tmp_path)


def test_a_disk_that_fills_at_the_end_loses_nothing(build, monkeypatch, capsys, tmp_path):
    def full(*a, **k): raise OSError(28, "No space left on device")
    torch.set_num_threads(1)
    with monkeypatch.context() as m:
        m.setattr(records, "where", full)                           # the last thing that a record needs
        assert cli.train(["--recipe", "digits", "--set", "epochs=1"]) == 1
        err = capsys.readouterr().err
        assert "could not be written" in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert cli.train(["--recipe", "digits", "--set", "epochs=1", "--out",
                      str(tmp_path/"out")]) == 0 and records.load_all(tmp_path/"out")
    with monkeypatch.context() as m:
        m.setattr(records, "write", full)
        assert cli.train(["--recipe", "digits", "--set", "epochs=1", "--out",
                          str(tmp_path/"more")]) == 1 and "The run is kept in" in capsys.readouterr().err
