"""Input that no program wants and every program gets: damaged files, impossible values, wrong objects, untidy folders, full disks.

`python tests/hostile.py` gives every case its own folder and its own forked process, and holds what happens against what should: an error
that says what was wrong, where and what to do, with exit code 2 (in Python a ValueError), or the work done right. Either way no file but
those of the build folder may have changed. It prints the counts by kind, and ends with '0 tracebacks, 0 silent acceptances' or a list.

    python tests/hostile.py --list          what there is
    python tests/hostile.py -k scales       one kind, or the cases whose name holds the word
    python tests/hostile.py -k scales -v    with what each of them said

A case is `case(what, do, exit, *words)`. `do`: the words of a command line (`training --recipe r.yaml`) or a function; `exit`: the exit
code, the exception, or several of either, `OK` for work that must be done; `words`: patterns that the error must hold. `files`: what lies
in the folder before. An error on a command line is one line `error: …`, under which a list may be indented; argparse's own errors, of an
option that does not exist or holds no number, are as it writes them: the usage, and a line `python -m …: error: …`.
"""
import argparse, hashlib, importlib, io, json, os, pickle, re, resource, shlex, shutil, signal, struct, subprocess, sys
import tempfile, time, traceback, warnings, zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

import repopt
from repopt import checkpoint, records
from repopt.grad_mult import GradMult, named_branch, rep_branches
from repopt.models import create_model, initial_scales, merge
from repopt.optim import RULES, attach, check_equivalence, clip_grad_norm_, param_groups, rep_optimizer
from repopt.scales import Scales, extract_scales, load_scales
from repopt.training import parameters

OK, LIMIT = 0, 60                                   # seconds that a case may take
KINDS, FIXTURES = [], {}


class Case(NamedTuple):
    kind: str
    what: str
    do: str | Callable
    exit: tuple
    words: tuple = ()
    files: dict = {}         # {name: text, bytes, or a function of the path that makes it}
    env: dict = {}
    also: str = "$^"         # lines of stderr that may stand beside the error
    may: tuple = ()          # globs of what may be made or changed, beside new files in build/
    after: Callable = None   # checks a command that ended well: a function of the folder and what was printed
    shell: bool = False      # `do` is for a shell, in an interpreter of its own
    without: tuple = ()      # modules that are not installed here
    disk: int = 0            # bytes that a file may have
    seconds: int = LIMIT


def kind(name):
    "The cases that the function yields are of this kind"
    return lambda f: KINDS.append((name, f)) or f


def cases(word=""): return [c._replace(kind=k) for k, f in KINDS for c in f() if not word or word == k or word in c.what]


def case(what, do, exit, *words, **more):
    return Case("", what, do, exit if isinstance(exit, tuple) else (exit,), words, **more)


def fixture(f):
    "What many cases begin with is made once, in a process of its own, and copied: `files={'build': f}`"
    FIXTURES[f.__name__] = f
    def put(path): shutil.copytree(made(f.__name__), path, symlinks=True)
    return put


@cache
def made(name):
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=SCRATCH))
    seen = forked(lambda: FIXTURES[name](folder), folder.parent/f"{name}.log")
    if seen.get("status"): raise RuntimeError(f"fixture {name}: {seen}")
    return folder


# How a case is made to happen

def forked(work, log, folder=".", env={}, seconds=LIMIT):
    "Do `work` in a process of its own, in `folder`. {'status': exit code, or what ended it, and what `work` left in the dict it is given}"
    sys.stdout.flush(), sys.stderr.flush()
    if (pid := os.fork()) == 0: _child(work, log, folder, env, seconds)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)          # workers that it left behind
    if os.WIFSIGNALED(status):
        ended = signal.Signals(os.WTERMSIG(status))
        return {"status": "hang" if ended is signal.SIGALRM else f"crash by {ended.name}"}
    return json.loads(log.with_suffix(".json").read_text())


def _child(work, log, folder, env, seconds):
    os.setsid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    for k in [k for k in os.environ if k.startswith(("REPOPT_", "SLURM_"))]: del os.environ[k]
    os.environ.update(env)
    seen = {}
    try: seen["status"] = work()
    except SystemExit as e: seen["status"] = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException as e:
        seen |= dict(status="raised", kind=type(e).__name__, text=str(e), trace=traceback.format_exc())
        seen["classes"] = [c.__name__ for c in type(e).__mro__]
    finally:
        with suppress(Exception): sys.stdout.flush()
        log.with_suffix(".json").write_text(json.dumps(seen, default=str))
        os._exit(0)


def command(words):
    "The exit code of `python -m repopt.<words>`, made in this process"
    module, *argv = shlex.split(words)
    sys.argv = [f"python -m repopt.{module}", *argv]
    main = getattr(importlib.import_module(f"repopt.{module}"), "main", None)
    if main is None: raise NotImplementedError(f"repopt.{module} has no command line")
    return main(argv)


def perform(c, log, folder):
    "Let the case happen. What `forked` says of it; `changed` names the objects that it watched and that are not as they were"
    watched, path = [], log.with_suffix(".watched")
    def watch(*things):
        watched.extend((x, digest(x)) for x in things)
        return things[0] if len(things) == 1 else things
    def work():
        if c.disk: resource.setrlimit(resource.RLIMIT_FSIZE, (c.disk, c.disk))
        for m in c.without:
            for loaded in [n for n in sys.modules if n == m or n.startswith(f"{m}.")]: del sys.modules[loaded]
            sys.modules[m] = None
        if isinstance(c.do, str): return command(c.do)
        try: c.do(watch)
        finally: path.write_text(" ".join(type(x).__name__ for x, before in watched if digest(x) != before))
        return OK
    env = {"REPOPT_BUILD": str(folder/"build"), "HOSTILE": str(folder), **c.env}
    seen = shell(c, log, folder, env) if c.shell else forked(work, log, folder, env, c.seconds)
    return seen | {"changed": path.read_text() if path.exists() else ""}


def shell(c, log, folder, env):
    "The same for a shell's line"
    with open(log.with_suffix(".out"), "wb") as out, open(log.with_suffix(".err"), "wb") as err:
        p = subprocess.Popen(["bash", "-o", "pipefail", "-c", c.do], cwd=folder, env={**os.environ, **env}, stdout=out, stderr=err,
                             stdin=subprocess.DEVNULL, start_new_session=True)
        try: return {"status": p.wait(c.seconds)}
        except subprocess.TimeoutExpired: return {"status": "hang"}
        finally:
            with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)


def digest(x) -> str:
    "What is in tensors, modules, optimizers and containers of them"
    h = hashlib.sha256()
    def add(x):
        if isinstance(x, torch.Tensor):
            if x.layout is not torch.strided: x = x.to_dense()
            h.update(f"{x.dtype}{tuple(x.shape)}{x.stride()}".encode() + x.detach().contiguous().view(torch.uint8).numpy().tobytes()
                     if x.numel() and not x.is_meta else f"{x.dtype}{tuple(x.shape)}".encode())
            if isinstance(x, nn.Parameter): add(x.grad)
        elif isinstance(x, nn.Module): add([(n, p) for n, p in [*x.named_parameters(), *x.named_buffers()]] + [x.training])
        elif isinstance(x, torch.optim.Optimizer):
            add([{k: v for k, v in g.items()} for g in x.param_groups])
            add([x.state.get(p) for g in x.param_groups for p in g["params"]])
        elif isinstance(x, dict): add([(str(k), v) for k, v in x.items()])
        elif isinstance(x, (list, tuple)):
            h.update(f"[{len(x)}".encode())
            for y in x: add(y)
        else: h.update(repr(x).encode())
    add(x)
    return h.hexdigest()


def snapshot(folder) -> dict:
    "{name: what is there} of all files, folders and links"
    found = {}
    for p in sorted(folder.rglob("*")):
        name = str(p.relative_to(folder))
        if p.is_symlink(): found[name] = f"link to {os.readlink(p)}"
        elif p.is_dir(): found[name] = "folder"
        elif p.is_file(): found[name] = f"{p.stat().st_size} bytes, {hashlib.sha256(p.read_bytes()).hexdigest()}"
    return found


def judged(c, seen, folder, out, err, before, after) -> tuple:
    "('handled', ''), or what is wrong with what happened, and how it looked"
    free = lambda n: any(fnmatch(n, g) for g in c.may)
    ours = lambda n: n == "build" or n.startswith("build/")
    touched = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n) and not free(n) and not (ours(n) and n not in before)]
    status, text = seen["status"], seen.get("text", "")
    codes, classes = [e for e in c.exit if isinstance(e, int)], [e.__name__ for e in c.exit if isinstance(e, type)]
    if status in ("hang",) or str(status).startswith("crash"): return status, err[-300:]
    if touched: return "files changed", ", ".join(touched[:5])
    if status == "raised":
        hits = classes and not isinstance(c.do, str) and {*seen["classes"]} & {*classes}
        if not hits and seen["kind"] == "AssertionError" and OK in codes: return "wrong value", text[:300]
        if not hits and seen["kind"] == "NotImplementedError" and isinstance(c.do, str): return "no such command", text
        if not hits: return "traceback", f"{seen['kind']}: {text}"[:300]
        if seen["changed"]: return "objects changed", f"{seen['changed']}; {seen['kind']}: {text[:200]}"
        return worded(c, text)
    if "Traceback (most recent call last)" in err: return "traceback", err.strip().splitlines()[-1]
    if status not in codes: return ("silent acceptance", (out or err)[-200:]) if status == OK else (f"exit {status}", err[-300:])
    if status != OK and isinstance(c.do, str): return said(c, err)
    return finished(c, folder, out)


def said(c, err):
    "Is what was written to stderr one error, in its form?"
    lines = [l for l in err.splitlines() if l.strip() and not re.search(c.also, l)]
    if lines and lines[0].startswith("usage: ") and re.match(r"\S.*: error: ", lines[-1]): return worded(c, lines[-1])
    first, *rest = lines or [""]
    if not first.startswith("error: ") or any(not l.startswith("  ") for l in rest): return "unclear", "stderr: " + " ⏎ ".join(lines)[:400]
    return worded(c, " ".join(lines))


def worded(c, text):
    lost = [w for w in c.words if not re.search(w, text, re.I)]
    if lost or not text.strip(): return "unclear", f"no {', '.join(map(repr, lost))} in: {text[:400]}"
    return "handled", text


def finished(c, folder, out):
    if not c.after: return "handled", out[-200:]
    try: c.after(folder, out)
    except AssertionError as e: return "wrong value", str(e)[:300]
    return "handled", out[-200:]


# Recipes

DIGITS = dict(data="digits", num_classes=10, image_size=8, test_size=8, model="repoptvgg_digits", strides="null", epochs=1, test_epochs=1,
              batch_size=648, lr_batch=64, lr=.01, momentum=.9, nesterov="true", weight_decay="4.0e-5", optimizer="sgd", warmup_epochs=0,
              schedule="cosine", label_smoothing=.1, clip_norm="null", bn_batch="null", augment="none", precision="fp32", compile="false",
              channels_last="true", scale_init="sqrt2l", init="msra", identity="one")


def digits(*, but=(), more="", **changes) -> str:
    "The text of a recipe whose run takes a second"
    return "".join(f"{k}: {v}\n" for k, v in {**DIGITS, **changes}.items() if k not in but) + more


def pictures(**changes) -> str:
    "The same for the two classes of the folder `pics`"
    return digits(**{**dict(data="pics", num_classes=2, batch_size=4, lr_batch=4), **changes})


def table(text) -> list:
    "[[words, pattern, …]] of lines `words | pattern | …`"
    return [[cell.strip() for cell in line.split(" | ")] for line in text.strip().splitlines()]


def link(to):
    "A symbolic link"
    return lambda path: path.symlink_to(to)


def recipe_case(what, text, *words, exit=2, **more):
    return case(what, "training --recipe r.yaml", exit, *words, files={"r.yaml": text}, **more)


@kind("recipe")
def recipe_files():
    "What a text editor, a mail program and a script leave"
    bad = partial(recipe_case)
    yield case("no such recipe", "training --recipe nosuch", 2, "nosuch", "digits")
    yield case("almost a recipe's name", "training --recipe digit", 2, "digit", "did you mean 'digits'")
    yield case("no such file", "training --recipe nosuch.yaml", 2, r"nosuch\.yaml")
    yield case("a folder", "training --recipe r.yaml", 2, r"r\.yaml", files={"r.yaml/x": ""})
    yield case("a dangling link", "training --recipe r.yaml", 2, r"r\.yaml", files={"r.yaml": link("gone")})
    yield bad("empty", "", r"r\.yaml")
    yield bad("a comment only", "# lr: 0.1\n", r"r\.yaml")
    yield bad("a list", "- lr\n- 0.1\n", r"r\.yaml")
    yield bad("a word", "digits\n", r"r\.yaml")
    yield bad("a tab", digits() + "a:\n\tb: 1\n", r"r\.yaml", "line 30|tab|\\\\t")
    yield bad("an open bracket", digits(strides="[1, 2"), r"r\.yaml", "line")
    yield bad("an open quote", digits(schedule="'cosine"), r"r\.yaml", "line")
    yield bad("two documents", digits() + "---\n" + digits(), r"r\.yaml")
    yield bad("an anchor that is not there", digits(lr="*peak"), r"r\.yaml", "peak")
    yield bad("a Python object", digits(lr="!!python/object/apply:os.system ['touch pwned']"), r"r\.yaml", "python")
    yield bad("latin-1", digits().encode() + b"# caf\xe9\n", r"r\.yaml")
    yield bad("UTF-16", digits(lr="fast").encode("utf-16"), r"r\.yaml|lr")
    yield bad("a NUL byte", digits().encode() + b"\0", r"r\.yaml")
    yield bad("a zip file", b"PK\x03\x04" + bytes(range(256)), r"r\.yaml")
    yield bad("JSON that was cut", json.dumps(DIGITS)[:-20], r"r\.yaml")
    yield bad("a key twice, two values", digits() + "lr: 0.2\n", r"r\.yaml", "lr", "twice|duplicate")
    yield bad("a key twice, one value", digits() + "epochs: 1\n", r"r\.yaml", "epochs", "twice|duplicate")
    yield bad("a number as key", digits() + "1: 2\n", r"unknown|key", "1")
    yield bad("null as key", digits() + "null: 2\n", "unknown|key")
    yield bad("no colon", digits() + "lr 0.2\n", r"r\.yaml")
    yield bad("an unknown key", digits() + "colour: red\n", "unknown key", "colour")
    yield bad("an unknown key, near one", digits() + "momentun: 0.9\n", "momentun", "did you mean '?momentum")
    yield bad("a key in capitals", digits() + "LR: 0.9\n", "LR", "did you mean '?lr")
    yield bad("a hyphen for an underscore", digits() + "weight-decay: 0\n", "weight-decay", "did you mean '?weight_decay")
    for key in ("data", "lr", "model", "epochs", "num_classes", "optimizer"):
        yield bad(f"lacks {key}", digits(but=[key]), "missing", key)
    for what, name in {"the folder above": "../r", "an absolute path": "/tmp/r", "a folder below": "a/b", "nothing": '""', "two dots": '".."',
                       "a number": "3", "null": "null", "a list": "[a]", "a new line": '"a\\nb"', "a NUL": '"a\\0b"'}.items():
        yield bad(f"its name: {what}", digits(name=name), "name")


BAD = table("""
    num_classes | 0 | -3 | 1.5 | ten | 11 | null | true
    image_size | 0 | -8 | 8.5 | 16 | big
    test_size | -5 | 0 | 2.5 | null
    epochs | 0 | -1 | 1.5 | .inf | .nan | many | null | true
    test_epochs | 0 | -1 | 0.5
    batch_size | 0 | -4 | 2.5 | 5000 | null
    lr_batch | 0 | -64 | .nan
    lr | fast | .nan | .inf | -0.1 | true | null | [0.1] | {a: 1}
    momentum | 2 | 1.01 | -0.1 | .nan | high | null
    weight_decay | -1 | .nan | .inf | much | null
    warmup_epochs | -1 | .nan | soon
    label_smoothing | -1 | -0.1 | 1 | 2 | .nan | some
    clip_norm | 0 | -1 | .nan | tight | [1]
    bn_batch | 0 | -1 | 1.5 | .nan
    nesterov | perhaps | 1 | null
    strides | [1, 2] | [2, 2, 2, 2] | [0, 1, 1, 1, 1] | [-1, 1, 1, 1, 1] | [a, b, c, d, e] | 2 | [1.5, 1, 1, 1, 1] | []
    schedule | linear | null | 1
    augment | mixup | null
    precision | fp8 | null | 16
    compile | maybe
    channels_last | perhaps
    scale_init | zeros | null
    init | xavier | null
    identity | none | null
    optimizer | rmsprop | null | 3
    model | resnet50 | repoptvgg | repoptvgg_z9 | null | 7
    data | null | 5""")


@kind("recipe value")
def recipe_values():
    "Every key with values of the wrong type, and with values that no run can mean"
    for key, *values in BAD:
        said = {"num_classes": "num_classes|classes", "batch_size": "batch"}.get(key, key)
        for v in values: yield recipe_case(f"{key}: {v}", digits(**{key: v}), said)
    yield recipe_case("nesterov without momentum", digits(momentum=0), "nesterov", "momentum")
    yield recipe_case("randaugment of images in memory", digits(augment="randaugment"), "augment")
    yield recipe_case("torchvision's net on one channel", digits(model="vgg16"), "vgg16")
    yield recipe_case("a RepOptimizer without scales", digits(optimizer="repsgd"), "repsgd", "scales")


@kind("--set")
def set_values():
    files = {"r.yaml": digits()}
    for pair, *words in table("""
        lr | KEY=VALUE
        =3 | --set|key
        lr= | lr
        lr=abc | lr
        lr=.nan | lr
        lr=nan | lr
        lr=inf | lr
        lr=[1 | lr
        lr={ | lr
        lr=&a | lr
        lr=*b | lr
        lr='0.1 | lr
        lr=yes | lr
        lr=1,5 | lr
        lr=-1 | lr
        lr=!!python/object/apply:os.system ['touch pwned'] | lr
        LR=0.1 | did you mean '?lr
        epoch=3 | did you mean '?epochs
        weight-decay=0 | did you mean '?weight_decay
        batchsize=3 | did you mean '?batch_size
        colour=red | colour
        name=../x | name
        name=a/b | name
        name=/tmp/x | name
        strides=2,x,1,1,1 | strides
        strides=2 | strides
        strides= | strides
        strides=2 1 1 1 1 | strides
        strides=0,0,0,0,0 | strides
        batch_size=64.5 | batch_size
        momentum=2 | momentum
        nesterov=maybe | nesterov
        clip_norm=tight | clip_norm
        label_smoothing=1 | label_smoothing
        weight_decay=-1 | weight_decay
        warmup_epochs=-1 | warmup_epochs
        epochs= | epochs
        data= | data
        model= | model
        test_size=-5 | test_size
        optimizer=sdg | did you mean '?sgd
        schedule=cosin | schedule
        """): yield case(f"--set {pair}", f"training --recipe r.yaml --set {shlex.quote(pair)}", 2, *words, files=files)
    for text, value in {"1e-3": 1e-3, "1E-3": 1e-3, "1": 1., "+.5e-2": .5e-2, "1.e-3": 1e-3}.items():
        def after(folder, out, value=value): assert asked(folder)["recipe"]["lr"] == value, asked(folder)["recipe"]["lr"]
        yield case(f"lr={text} is {value}", f"training --recipe r.yaml --set lr={text}", OK, files=files, after=after)


def asked(folder) -> dict:
    "What the run in build/ was asked for"
    return json.loads(next((folder/"build").glob("runs/*/record.json")).read_text())["asked"]


# Command lines

@kind("arguments")
def training_arguments():
    yield case("training", "training", 2, "--recipe")
    for words, *said in table("""
        --seed x | --seed
        --seed 1.5 | --seed
        --seed | --seed
        --gpus 0 | gpus
        --gpus -1 | gpus
        --gpus x | --gpus
        --nodes 0 | nodes
        --nodes -2 | nodes
        --nodes 2 | nodes=2 | Slurm
        --gpus 5 | batch_size=648 | 5
        --save-seconds -1 | save.seconds
        --save-seconds nan | save.seconds
        --save-seconds soon | --save-seconds
        --optimizer foo | foo | repsgd
        --mode foo | foo | csla
        --model nosuch | nosuch | repoptvgg
        --model repoptvgg_digit | did you mean '?repoptvgg_digits
        --model '' | model
        --broken maybe | maybe | skip
        --colour red | --colour
        more words | more
        --scales nosuch | nosuch
        --scales '' | scales
        --scales nosuch.safetensors | nosuch.safetensors | no (such )?file|not exist
        --optimizer repsgd | repsgd | scales
        --optimizer repadamw | repadamw | scales
        --mode hs --model repvgg_digits | repvgg_digits | hs
        --mode csla --model repvgg_digits | repvgg_digits | csla
        --mode hs --model vgg16 | vgg16
        --optimizer repsgd --scales ones --model repvgg_digits | repvgg_digits|scales
        --optimizer repsgd --scales repoptvgg_digits --model repoptghostnet_digits | scales
        --model repoptghostnet_digits_se | ghostnet | se
        --set lr | KEY=VALUE
        --weights nosuch.pth | nosuch.pth
        --weights . | file|folder|directory
        --weights '' | weights|file
        --data nosuch --set data=pics | nosuch
        --set data=pics | REPOPT_DATA|data
        --data . --set data=cifar100 | CIFAR-100
        --data . --set data=caltech256 | Caltech
        --data r.yaml --set data=pics | r.yaml
        --recipe | --recipe
        --out r.yaml | r.yaml
        --out r.yaml/x | r.yaml
        --out /proc/x | /proc/x
        --out /dev/null | /dev/null
        --out /dev/full/x | /dev/full
        --out '' | out
        """): yield case(f"training {words}", f"training --recipe r.yaml {words}", 2, *said, files={"r.yaml": digits()})
    for words, *said in table("""
        --compare 0 | compare
        --compare -3 | compare
        --compare x | --compare
        --compare 1.5 | --compare
        --optimizer repsgd | --optimizer
        --mode target | --mode
        --model repvgg_digits | repvgg_digits
        --model vgg16 | vgg16
        --model nosuch | nosuch
        --set scale_init=zeros | scale_init
        --set optimizer=repsgd | repsgd | scales|search
        --data nosuch --set data=pics | nosuch
        --out r.yaml | r.yaml
        --out /proc/x | /proc/x
        --seed one | --seed
        --save-seconds -1 | save.seconds
        """): yield case(f"hyper_search {words}", f"hyper_search --recipe r.yaml {words}", 2, *said, files={"r.yaml": digits()})
    yield case("hyper_search", "hyper_search", 2, "--recipe")
    wild = {"r.yaml": digits(epochs=4, label_smoothing=0, lr="1.0e+30", channels_last="false")}
    for module in ("training", "hyper_search"):
        yield case(f"{module} that diverges", f"{module} --recipe r.yaml", 1, "finite", "lr", files=wild)


@kind("arguments")
def other_arguments():
    files = {"a.txt": "mine", "empty/.keep": ""}
    for words, *said in table("""
        speed --train b9 | b9 | b1
        speed --train , | train
        speed --optimizers --models b9 | b9
        speed --infer nosuch | nosuch
        speed --infer timm/nosuch | nosuch
        speed --infer timm/ | timm
        speed --size x | size
        speed --size 0 | size
        speed --size -32 | size
        speed --size 64.5 | size
        speed --batch 0 | batch
        speed --batch -1 | batch
        speed --batch x | batch
        speed --batch max | batch
        speed --batch 100000000 --train l2 | GB
        speed --precision fp8 | fp8
        speed --precision tf32 | tf32
        speed --rounds 1 | rounds
        speed --rounds x | --rounds
        speed --minutes x | --minutes
        speed --minutes nan | minutes
        speed --minutes -1 | minutes
        speed --memory-cap -1 | memory.cap
        speed --memory-cap nan | memory.cap
        speed --compiled b9 | b9
        speed --infer vgg16 --infer-batch 0 | infer.batch
        speed --colour | --colour
        speed --infer vgg16 --out a.txt | a.txt
        speed --infer vgg16 --out /proc/x | /proc/x
        quantization | --runs
        quantization --runs | --runs
        quantization --runs nosuch | nosuch
        quantization --runs ../../etc | ../
        quantization --runs '' | run
        quantization --speed nosuch | nosuch
        quantization --speed repoptvgg_digits --size 0 | size
        quantization --speed repoptvgg_digits --size -1 | size
        quantization --speed repoptvgg_digits --size x | --size
        quantization --speed repoptvgg_digits --out a.txt | a.txt
        quantization --runs x --qat-epochs -1 | qat.epochs
        quantization --runs x --qat-rate -1 | qat.rate
        quantization --runs x --qat-rate nan | qat.rate
        quantization --runs x --qat-epochs 1 --qat-batches 0 | qat.batches
        records --out nosuch | nosuch
        records --out a.txt | a.txt
        records --experiment dance | dance
        records --colour | --colour
        records more | more
        data | what|cifar100|pack
        data fetch | fetch
        data cifar100 | folder
        data cifar100 a.txt | a.txt
        data cifar100 /proc/x | /proc/x
        data pack | folder
        data pack empty | packed
        data pack nosuch to | nosuch
        data pack a.txt to | a.txt
        data pack empty to | empty
        scales | convert
        scales show x | show
        scales convert | IN|in|arguments
        scales convert a.txt | OUT|out|arguments
        scales convert nosuch.pth o.safetensors | nosuch.pth
        scales convert a.txt o.safetensors | a.txt
        scales convert empty o.safetensors | empty
        """): yield case(words, words, 2, *said, files=files)
    yield case("plan of no recipe", "python -m repopt.plan --recipe nosuch", 2, "nosuch", shell=True)
    for size in ("0", "-1", "x"):
        yield case(f"data pack --size {size}", f"data pack pics to --size {size}", 2, "size", files={"pics": two_classes})
    full = {"full/train.part": link("/dev/full"), "full/train.u8.part": link("/dev/full")}
    for what, to, more in (("a file", "a.txt", {"a.txt": "mine"}), ("/proc", "/proc/x", {}), ("a full device", "full", full)):
        yield case(f"data pack onto {what}", f"data pack pics {to}", 2, to, files={"pics": two_classes, **more})
    for to in ("/dev/full/x", "d"):
        yield case(f"scales convert onto {to}", f"scales convert s.safetensors {to}", 2, to, files={"s.safetensors": scales_file(), "d/x": ""})


# Folders of pictures

@fixture
def two_classes(folder):
    "Two classes of six pictures to train and three to test, 12 pixels and more"
    draw = np.random.default_rng(0)
    for i, (split, n) in enumerate((("train", 6), ("val", 3))):
        for k, name in enumerate(("cat", "dog")):
            (place := folder/split/name).mkdir(parents=True)
            for j in range(n): Image.fromarray(draw.integers(0, 256, (12 + j, 14, 3), np.uint8)).save(place/f"{i}{k}{j}.png")


@fixture
def packed(folder):
    "The same, packed"
    from repopt.data import pack
    assert pack(made("two_classes"), folder) == dict(train=12, val=6)


@fixture
def caltech(folder):
    "Caltech256 in small: two categories of ten"
    draw = np.random.default_rng(0)
    for name in ("001.ak47", "056.dog"):
        (place := folder/"256_ObjectCategories"/name).mkdir(parents=True)
        for j in range(10): Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8)).save(place/f"{name[:3]}_{j:04d}.jpg")


def picture(format="PNG", size=(12, 12), mode="RGB", cut=None):
    "A picture, or what is left of it after `cut` bytes"
    def put(path):
        to, data = io.BytesIO(), np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(data).convert(mode).save(to, format)
        path.write_bytes(to.getvalue()[:cut])
    return put


def spoilt(*names, by="not a picture"):
    "The folder of two classes with `by` in the place of some pictures: globs"
    def put(path):
        two_classes(path)
        for name in names:
            for p in path.glob(name): p.write_text(by)
    return put


def without(*names):
    "The same less the files and folders of some globs"
    def put(path):
        two_classes(path)
        for name in names:
            for p in path.glob(name): shutil.rmtree(p) if p.is_dir() else p.unlink()
    return put


def with_more(**more):
    return {f"pics/{k}": v for k, v in more.items()}


BROKEN = "cannot be decoded|broken picture"


@kind("pictures")
def picture_folders():
    "The same folders through both loaders: in memory at 8 pixels, and by workers at 72"
    for size in (8, 72):
        text = pictures(image_size=size, test_size=size)
        def run(what, exit, *said, words="", **files):
            more = {k: files.pop(k) for k in ("after", "seconds", "text") if k in files}
            given = {"r.yaml": more.pop("text", text), **{k.replace("__", "/"): v for k, v in files.items()}}
            return case(f"{what}, at {size} pixels", f"training --recipe r.yaml --data . {words}", exit, *said, files=given, also=BROKEN, **more)
        def trained(n, tested):
            def after(folder, out):
                a = json.loads(next((folder/"build").glob("runs/*/record.json")).read_text())
                share = [a["metrics"]["top1"]*k/100 for k in (tested,)]
                assert abs(share[0] - round(share[0])) < 1e-9, f"top-1 {a['metrics']['top1']} is not of {tested} pictures"
            return after
        yield run("no folder", 2, "pics|class folders")
        yield run("an empty folder", 2, "pics", "train", pics__x="")
        yield run("no val", 2, "val", "class", pics=without("val"))
        yield run("no train", 2, "train", "class", pics=without("train"))
        yield run("no class folders", 2, "train", "class", pics=without("*/*"))
        yield run("other classes in val", 2, "cat", pics=without("val/cat"))
        yield run("an empty class", 2, "train/cat", "no pictures|empty|holds no", pics=without("train/cat/*"))
        yield run("an empty class of the test", 2, "val/cat", "no pictures|empty|holds no", pics=without("val/cat/*"))
        yield run("both classes empty", 2, "train", pics=without("*/*/*"))
        yield run("texts only", 2, "pics", pics=renamed("txt"))
        yield run("every picture broken", 2, "train|pics", "decode", pics=spoilt("*/*/*"))
        yield run("every training picture broken", 2, "train|pics", "decode", pics=spoilt("train/*/*"))
        yield run("every picture of the test broken", 2, "val|pics", "decode", pics=spoilt("val/*/*"))
        yield run("all of one class broken", 2, "dog", pics=spoilt("train/dog/*"))
        yield run("a broken one where none may be", 2, "0[01]0.png", "refuse|repair", words="--broken refuse", pics=spoilt("train/cat/000.png"))
        yield run("another number of classes", 2, "2 classes", "num_classes=3", pics=two_classes, text=pictures(image_size=size, test_size=size, num_classes=3))
        yield run("fewer than a batch", 2, "12", "13", pics=two_classes, text=pictures(image_size=size, test_size=size, batch_size=13))
        yield run("a link to a folder above", (OK, 2), "link|loop|train", pics=two_classes, pics__train__cat__up=link(".."), after=trained(12, 6))
        yield run("a link to another class", (OK, 2), "link|dog", pics=two_classes, pics__train__cat__more=link("../dog"), after=trained(12, 6))
        for what, name, made in (("a text named .png", "train/cat/a.png", "text"), ("an empty picture", "train/cat/a.jpg", ""),
                                 ("a cut JPEG", "train/dog/a.jpg", picture("JPEG", cut=200)), ("a dangling link", "train/cat/a.png", link("gone.png")),
                                 ("a folder named .png", "train/cat/a.png/x", ""), ("a cut PNG of the test", "val/cat/a.png", picture(cut=100))):
            yield run(what, OK, pics=two_classes, after=trained(12, 6), **{f"pics/{name}": made})
        for what, name, made in (("a notebook's checkpoints", "train/.ipynb_checkpoints/a.png", picture()), ("a Mac's .DS_Store", "train/cat/.DS_Store", "x"),
                                 ("a Mac's ._ files", "train/cat/._000.png", "x"), ("a hidden class", "val/.cache/x", ""), ("a list beside the classes", "train/list.txt", "a"),
                                 ("pictures a folder deeper", "train/cat/images/a.png", picture()), ("a palette", "train/cat/a.png", picture(mode="P")),
                                 ("grey", "train/cat/a.png", picture(mode="L")), ("CMYK", "train/cat/a.jpg", picture("JPEG", mode="CMYK")),
                                 ("a name of another script", "train/cat/猫 é\n.png", picture()), ("one pixel", "train/cat/a.png", picture(size=(1, 1))),
                                 ("a strip of 1×4000", "train/cat/a.png", picture(size=(1, 4000))), ("a strip of 4000×1", "train/cat/a.png", picture(size=(4000, 1)))):
            yield run(what, OK, pics=two_classes, after=trained(12, 6), seconds=25, **{f"pics/{name}": made})


def renamed(suffix):
    def put(path):
        two_classes(path)
        for p in path.glob("*/*/*"): p.rename(p.with_suffix(f".{suffix}"))
    return put


@kind("pictures")
def single_pictures():
    "What a picture's pixels become"
    def grey16(watch):
        from repopt.data import load_image_folder
        for split in ("train", "val"):
            for name, value in (("cat", 0), ("dog", 30000)):
                Path(f"pics/{split}/{name}").mkdir(parents=True)
                Image.fromarray(np.full((8, 8), value, np.uint16)).save(f"pics/{split}/{name}/a.png")
        train, _ = load_image_folder("pics", 8)
        assert train.images[1].float().mean().item() == 30000//257 or abs(train.images[1].float().mean() - 30000/257) < 1.5, f"30000 of 65535 became {train.images[1].float().mean():.0f} of 255"
    yield case("16 bits of grey", grey16, OK, may=("pics*",))
    def greg(watch):
        from repopt.data import load_caltech256
        shutil.copytree(made("caltech"), "c")
        for junk in ("greg", "RENAME2"):
            Path(f"c/256_ObjectCategories/056.dog/{junk}").mkdir()
            picture("JPEG", (9, 9))(Path(f"c/256_ObjectCategories/056.dog/{junk}/056_0001.jpg"))
        sizes = [len(s) for s in load_caltech256("c", 8)]
        assert sizes == [16, 4], f"{sizes} pictures of 16 and 4"
    yield case("Caltech256's own junk", greg, OK, may=("c*",))


def damaged(**parts):
    "A packed folder, damaged: train's index with other arrays (None: without), or a file with other bytes"
    def put(path):
        packed(path)
        index, to = dict(np.load(path/"train.npz")), path/"train.npz"
        for k, v in parts.items():
            if k in ("npz", "u8"):
                file = path/f"train.{k}"
                new = v(file.read_bytes()) if callable(v) else v
                if new is None: file.unlink()
                else: file.write_bytes(new)
            else:
                index[k] = v(index[k]) if callable(v) else v
                np.savez(to, **{k: v for k, v in index.items() if v is not None})
    return put


@kind("pictures")
def packed_folders():
    for what, parts in {
            "index cut": dict(npz=lambda b: b[:-40]), "index empty": dict(npz=b""), "index of junk": dict(npz=b"junk"*50), "no index": dict(npz=None),
            "pixels cut": dict(u8=lambda b: b[:-1]), "pixels too many": dict(u8=lambda b: b + b"\0"), "no pixels": dict(u8=b""), "label 99 of 2": dict(labels=lambda y: np.where(y == y[0], 99, y)),
            "a label of -1": dict(labels=lambda y: y - 1), "labels of floats": dict(labels=lambda y: y + .5), "no labels": dict(labels=None), "fewer labels": dict(labels=lambda y: y[:-1]),
            "places that go back": dict(offsets=lambda o: np.r_[o[:2][::-1], o[2:]]), "places of floats": dict(offsets=lambda o: o*1.), "no places": dict(offsets=None),
            "sizes of others": dict(sizes=lambda s: s + 1), "sizes below zero": dict(sizes=lambda s: -s), "no sizes": dict(sizes=None), "no classes": dict(classes=None), "one class too many": dict(classes=np.array(["cat", "dog", "owl"])),
            "classes that are code": dict(classes=np.array([Evil()], dtype=object))}.items():
        text = pictures(data="packed", image_size=72, test_size=72)
        yield case(f"packed: {what}", "training --recipe r.yaml --data .", 2, "train|3 classes", files={"r.yaml": text, "packed": damaged(**parts)})
    def half(path):
        packed(path)
        for p in path.glob("val*"): p.unlink()
    yield case("packed: only train", "training --recipe r.yaml --data .", 2, "val", files={"r.yaml": pictures(data="packed", image_size=72, test_size=72), "packed": half})


@kind("pictures")
def other_sets():
    text = digits(data="cifar100", num_classes=100, image_size=32, test_size=32)
    names = ("train", "test", "meta")
    for what, content in (("of nothing", b""), ("of junk", b"junk"), ("of code", pickle.dumps({}))):
        yield case(f"CIFAR-100 {what}", "training --recipe r.yaml --data .", 2, "CIFAR-100", "md5|intact", files={"r.yaml": text, **{f"cifar-100-python/{n}": content for n in names}})
    yield case("CIFAR-100 in a file", "training --recipe r.yaml --data .", 2, "CIFAR-100", files={"r.yaml": text, "cifar-100-python": "x"})
    text = pictures(data="caltech256")
    yield case("Caltech256 without pictures", "training --recipe r.yaml --data .", 2, "Caltech|256_Object", files={"r.yaml": text, "256_ObjectCategories/001.ak47/x": ""})
    yield case("Caltech256 in a file", "training --recipe r.yaml --data .", 2, "Caltech|256_Object", files={"r.yaml": text, "256_ObjectCategories": "x"})


class Evil:
    "A pickle of it leaves a file where it is loaded"
    def __reduce__(self): return os.system, ("touch pwned",)


# Files of scales

@cache
def own_scales() -> Scales: return initial_scales("repoptvgg_digits")


def scales_file(head={}, order=True, **flat):
    "Our scales of the digits net, with other tensors (None: without) and another header (None: without), signed as they are"
    def put(path):
        tensors = {k: v for k, v in {**own_scales().flat(), **flat}.items() if v is not None}
        h = hashlib.sha256()
        for k, v in sorted(tensors.items()): h.update(f"{k}{tuple(v.shape)}{v.dtype}".encode() + v.contiguous().view(torch.uint8).numpy().tobytes())
        own = dict(format="1", order=json.dumps(list(dict.fromkeys(k.rpartition("/")[0] for k in tensors))), arch="repoptvgg_digits", recipe="sqrt2l", seed="0", accuracy="null", commit="", sha256=h.hexdigest())
        path.write_bytes(safetensors_bytes(tensors, {k: v for k, v in {**own, **head}.items() if v is not None}))
    return put


def cut(put, n):
    "The first `n` bytes (less than 0: but the last) of what `put` writes"
    def shorter(path):
        put(path)
        path.write_bytes(path.read_bytes()[:n])
    return shorter


def flipped(put, at=-5):
    "What `put` writes with one byte changed"
    def other(path):
        put(path)
        data = bytearray(path.read_bytes())
        data[at] ^= 64
        path.write_bytes(data)
    return other


def torch_file(x, **how):
    "What torch.save makes of `x`, or of what it returns"
    return lambda path: torch.save(x() if callable(x) and not isinstance(x, type) else x, path, **how)


def script(path):
    "A TorchScript archive, as torch.jit.save writes it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), path)


def added(put, **entries):
    "A zip with more in it"
    def more(path):
        put(path)
        with zipfile.ZipFile(path, "a") as z:
            for name, text in entries.items(): z.writestr("archive/" + name.replace("__", "/"), text)
    return more


JUNK = {"nothing": "", "a page of HTML": "<!DOCTYPE html><html><body>404 Not Found</body></html>", "a pointer of git-lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "junk": bytes(range(256))*9, "a zip of texts": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "half a zip": cut(torch_file({"a": torch.ones(3)}), 300), "zeros": b"\0"*4096,
        "a pickle of code": pickle.dumps(Evil()), "torch.save of code": torch_file(Evil()), "a TorchScript": script, "a numpy archive": lambda path: np.savez(open(path, "wb"), a=np.ones(3)),
        "a folder": lambda path: path.mkdir(), "a dangling link": link("gone"), "a link to itself": lambda path: path.symlink_to(path.name), "a list of tensors": torch_file([torch.ones(2)]), "a number": torch_file(3),
        "an empty dict": torch_file({}), "numbers by name": torch_file({"model": {"a": 1, "b": 2.}})}
FIRST, SECOND = "stage0.conv.weight", "stage1.0.conv.weight"


@kind("scales file")
def scales_files():
    def bad(what, put, *said, name="s.safetensors", more=""):
        return case(what, f"training --recipe r.yaml --optimizer repsgd --scales {name} {more}", 2, *(said or (re.escape(name),)), files={"r.yaml": digits(), name: put})
    for what, put in JUNK.items():
        for name in ("s.safetensors", "s.pth"): yield bad(f"{what}, named .{name.partition('.')[2]}", put, name=name)
    good, n = scales_file(), len(own_scales()[FIRST]["conv"])
    yield bad("cut by 10", cut(good, -10))
    yield bad("cut in its header", cut(good, 50))
    yield bad("its last value changed", flipped(good), r"s\.safetensors", "damaged")
    yield bad("its header changed", flipped(good, 20))
    yield bad("a header of 2^60 bytes", struct.pack("<Q", 1 << 60) + b"{}")
    yield bad("a header that is no JSON", struct.pack("<Q", 8) + b"not json")
    yield bad("a header that is a list", struct.pack("<Q", 8) + b"[1,2,3] ")
    yield bad("no tensors", lambda path: path.write_bytes(safetensors_bytes({}, {"format": "1"})))
    yield bad("weights", lambda path: path.write_bytes(safetensors_bytes(digits_weights())))
    for key in ("format", "order", "arch", "recipe", "seed", "accuracy", "commit", "sha256"):
        yield bad(f"without {key}", scales_file({key: None}), r"s\.safetensors", key if key != "format" else "format")
    yield bad("of a newer format", scales_file({"format": "2"}), r"s\.safetensors", "format")
    yield bad("order is no JSON", scales_file({"order": "[1,"}), r"s\.safetensors", "order|header|damaged")
    yield bad("order is a number", scales_file({"order": "7"}), r"s\.safetensors", "order|header|damaged")
    yield bad("order names others", scales_file({"order": '["a.weight"]'}), r"s\.safetensors", "a.weight|order")
    yield bad("order leaves some out", scales_file({"order": json.dumps([FIRST])}), r"s\.safetensors", "order|damaged|stage")
    yield bad("seed is no JSON", scales_file({"seed": "{"}), r"s\.safetensors", "seed|header|damaged")
    for what, v, said in (("NaN", torch.full((n,), torch.nan), "finite"), ("inf", torch.full((n,), torch.inf), "finite"), ("one value too many", torch.ones(n + 1), f"{n + 1}"), ("two dimensions", torch.ones(n, 1), "shape"),
                          ("a number alone", torch.tensor(1.), "shape"), ("no values", torch.ones(0), "0"), ("integers", torch.ones(n, dtype=torch.int32), "int"), ("complex", torch.ones(n, dtype=torch.complex64), "complex"), ("booleans", torch.ones(n, dtype=torch.bool), "bool")):
        yield bad(f"values: {what}", scales_file(**{f"{FIRST}/conv": v}), "stage0", said)
    yield bad("a branch that nobody knows", scales_file(**{f"{FIRST}/pool": torch.ones(n)}), "pool")
    yield bad("a branch larger than the kernel", scales_file(**{f"{FIRST}/conv_5x5": torch.ones(n)}), "5")
    yield bad("a name without a branch", scales_file(**{"alone": torch.ones(3)}))
    yield bad("a kernel that the net lacks", scales_file(**{"stage9.conv.weight/conv": torch.ones(3)}), "stage9.conv.weight", "no such parameter")
    yield bad("a kernel of the net missing", scales_file(**{f"{SECOND}/{b}": None for b in own_scales()[SECOND]}), "stage1.0.conv.weight", "no scales")
    yield bad("of another net", lambda path: initial_scales("repoptvgg_b1").save(path), "fit")
    yield bad("scales for a net of torchvision", good, more="--model repoptghostnet_digits")
    yield bad("the authors', of another net", torch_file(lambda: authors(initial_scales("repoptvgg_b1"))), "fit", name="s.pth")
    yield bad("the authors', with NaN", torch_file(lambda: {**authors(own_scales()), "stage0.scale_conv.weight": torch.full((n,), torch.nan)}), "finite", name="s.pth")
    yield bad("the authors', with code", torch_file(lambda: {**authors(own_scales()), "x": Evil()}), name="s.pth")
    yield case("the authors'", "training --recipe r.yaml --optimizer repsgd --scales s.pth", OK, files={"r.yaml": digits(), "s.pth": torch_file(lambda: authors(own_scales()))})
    yield case("the authors', converted", "scales convert s.pth o.safetensors", OK, files={"s.pth": torch_file(lambda: authors(own_scales()))}, may=("o.safetensors",), after=lambda folder, out: converted(folder))
    for what, put in JUNK.items(): yield case(f"scales convert: {what}", "scales convert s.pth o.safetensors", 2, r"s\.pth", files={"s.pth": put})


def converted(folder): assert Scales.load(folder/"o.safetensors").hash == own_scales().hash, "other values"


def authors(scales) -> dict:
    "Scales as the authors' files have them"
    names = dict(conv="scale_conv", conv_1x1="scale_1x1", identity="scale_identity")
    return {f"{p.removesuffix('.conv.weight')}.{names[b]}.weight": s for p, bs in scales.items() for b, s in bs.items()}


# Files of weights

@cache
def digits_weights() -> dict:
    torch.manual_seed(0)
    return create_model("repoptvgg_digits", num_classes=10, in_chans=1).state_dict()


def weights(**other):
    "The state dict of the digits net with other tensors (None: without)"
    return lambda: {k: v for k, v in {**digits_weights(), **{k.replace("__", "."): v for k, v in other.items()}}.items() if v is not None}


@kind("weights file")
def weights_files():
    def run(what, put, exit=2, *said, name="w.pth"):
        return case(what, f"training --recipe r.yaml --weights {name}", exit, *(said or (re.escape(name),)), files={"r.yaml": digits(), name: put})
    for what, put in JUNK.items():
        for name in ("w.pth", "w.safetensors"): yield run(f"{what}, named .{name.partition('.')[2]}", put, name=name)
    W = digits_weights()[FIRST]
    for what, v, said in (("NaN", W*torch.nan, "finite|nan"), ("inf", W/0, "finite|inf"), ("integers", W.round().long(), "int"), ("bytes", W.to(torch.uint8), "int"), ("booleans", W > 0, "bool"), ("complex", W + 0j, "complex"),
                          ("another shape", W[:, :, :1, :1], "stage0"), ("a transposed kernel", W.transpose(0, 1).contiguous(), "stage0"), ("nothing", W[:0], "stage0"), ("sparse", W.to_sparse(), "sparse|layout|stage0"), ("on no device", W.to("meta"), "stage0|meta")):
        yield run(f"a kernel of {what}", torch_file(weights(**{FIRST: v})), 2, r"w\.pth", f"{said}|stage0.conv.weight")
    for what, v in (("NaN", W*torch.nan), ("integers", W.round().long()), ("complex", W + 0j)):
        put = lambda path, v=v: path.write_bytes(safetensors_bytes(weights(**{FIRST: v})()))
        yield run(f"a kernel of {what}, in safetensors", put, 2, r"w\.safetensors", "stage0|finite|int|complex", name="w.safetensors")
    yield run("averages of NaN", torch_file(weights(**{"stage0.bn.running_mean": torch.full((len(W),), torch.nan)})), 2, r"w\.pth", "finite|nan")
    yield run("no classifier", torch_file(weights(**{"linear.weight": None, "linear.bias": None})), 2, r"w\.pth", "linear")
    yield run("a kernel missing", torch_file(weights(**{SECOND: None})), 2, r"w\.pth", "stage1.0.conv.weight")
    yield run("a kernel too many", torch_file(weights(**{"stage9.conv.weight": W})), 2, r"w\.pth", "stage9")
    yield run("another number of classes", torch_file(weights(**{"linear.weight": torch.zeros(1000, digits_weights()["linear.weight"].shape[1]), "linear.bias": torch.zeros(1000)})), 2, r"w\.pth", "1000 classes|linear")
    yield run("another architecture", torch_file(lambda: create_model("repoptghostnet_digits", num_classes=10, in_chans=1).state_dict()), 2, r"w\.pth", "fit|differ")
    yield run("torchvision's resnet18", torch_file(resnet), 2, r"w\.pth", "fit|differ|layout")
    yield run("an optimizer's state", torch_file(lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), .1, .9).state_dict()), 2, r"w\.pth")
    yield run("a whole module", torch_file(lambda: nn.Linear(2, 2)), 2, r"w\.pth")
    yield run("scales", scales_file(), 2, r"w\.safetensors", name="w.safetensors")
    yield run("a dict that holds itself", torch_file(itself), 2, r"w\.pth")
    yield run("with constants.pkl beside its data", added(torch_file(weights()), constants__pkl="x", **{"constants.pkl": "x"}), 2, r"w\.pth", "TorchScript|code|constants")
    yield run("with code beside its data", added(torch_file(weights()), code____torch__="x", **{"code/__torch__.py": "import os"}), 2, r"w\.pth", "TorchScript|code")
    for what, put in (("as they are", torch_file(weights())), ("with code among them", torch_file(lambda: {"model": weights()(), "config": Evil()})), ("in the old format", torch_file(weights(), _use_new_zipfile_serialization=False)),
                      ("wrapped three times", torch_file(lambda: {"state_dict": {"model": {f"module.{k}": v for k, v in weights()().items()}}})), ("in half precision", torch_file(lambda: {k: v.half() if v.is_floating_point() else v for k, v in weights()().items()})),
                      ("in double precision", torch_file(lambda: {k: v.double() if v.is_floating_point() else v for k, v in weights()().items()}))):
        yield run(f"good weights {what}", put, OK)
    for mode in ("csla", "hs"): yield case(f"a target's weights as {mode}", f"training --recipe r.yaml --weights w.pth --mode {mode}", 2, r"w\.pth", files={"r.yaml": digits(), "w.pth": torch_file(weights())})


def resnet():
    import torchvision
    return torchvision.models.resnet18().state_dict()


def itself():
    d = {}
    d["model"] = d
    return d


def lay(folder, files):
    "Put `files` into `folder`"
    for name, content in files.items():
        (path := folder/name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content): content(path)
        else: path.write_bytes(content.encode() if isinstance(content, str) else content)


def play(c, number) -> tuple:
    "(verdict, what was seen) of one case, in a folder of its own"
    folder, log = SCRATCH/f"{number}", SCRATCH/f"{number}.log"
    folder.mkdir()
    lay(folder, c.files)
    before = snapshot(folder)
    seen = perform(c, log, folder)
    out, err = (log.with_suffix(s).read_text(errors="replace") for s in (".out", ".err"))
    verdict = judged(c, seen, folder, out, err, before, snapshot(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


def main(argv=None) -> int:
    "Play the cases, print the counts and the list of what is not handled. Returns the exit code."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-k", metavar="WORD", default="", help="a kind, or a word of the cases' names")
    p.add_argument("-l", "--list", action="store_true", help="print the cases, play none")
    p.add_argument("-v", "--verbose", action="store_true", help="print what each case said")
    a = p.parse_args(argv)
    began, counts, wrong = time.time(), defaultdict(Counter), []
    for number, c in enumerate(cases(a.k)):
        if a.list: print(f"{c.kind}: {c.what}")
        verdict, seen = ("listed", "") if a.list else play(c, number)
        counts[c.kind][verdict] += 1
        if verdict not in ("handled", "listed"): wrong.append((verdict, c, seen))
        if a.verbose: print(f"{verdict}: {c.kind}: {c.what}: {seen}", flush=True)
    print(*(f"{v}: {c.kind}: {c.what}: {seen}" for v, c, seen in wrong), sep="\n", end="\n" if wrong else "")
    for k, seen in counts.items(): print(f"{k:20} {sum(seen.values()):4}  " + ", ".join(f"{n} {v}" for v, n in seen.most_common()))
    total = sum(counts.values(), Counter())
    print(f"{sum(total.values())} cases of {len(counts)} kinds in {time.time() - began:.0f} s: {total['handled']} handled")
    print(f"{total['traceback']} tracebacks, {total['silent acceptance']} silent acceptances")
    return 1 if wrong or not total else 0


SCRATCH = Path(tempfile.mkdtemp(prefix="hostile-"))
torch.set_num_threads(1)

if __name__ == "__main__":
    try: sys.exit(main())
    finally: shutil.rmtree(SCRATCH, ignore_errors=True)
