"""Input that no program wants and every program gets: damaged files, impossible values, wrong objects, untidy folders,
full disks.

`python tests/hostile.py` gives every case its own folder, and holds what happens against what should: an error that
says what was wrong, where and what to do, with exit code 2 (in Python a ValueError), or the work done right. Either way
no file but those of the build folder may have changed. It prints the counts by kind, and ends with '0 tracebacks, 0
silent acceptances' or a list. `tests/test_hostile.py` plays them in pytest.

The cases of a kind share a forked process, one after the other; where one ends it, by a crash or by taking too long,
the next ones go on in another. A case that changes a process for good (a disk that is full, a package that is missing,
the environment) has one of its own.

    python tests/hostile.py --list          what there is
    python tests/hostile.py -k scales       one kind, or the cases whose name holds the word
    python tests/hostile.py -k scales -v    with what each of them said

A case is `case(what, do, exit, *words)`. `do`: the words of a command line (`train --recipe r.yaml`) or a function;
`exit`: the exit
code, the exception, or several of either, `OK` for work that must be done; `words`: patterns that the error must hold.
`files`: what lies
in the folder before. An error on a command line is one line `error: …`, under which a list may be indented; argparse's
own errors, of an
option that does not exist or holds no number, are as it writes them: the usage, and a line `python -m …: error: …`.
"""
import argparse, atexit, hashlib, importlib, io, json, os, pickle, re, resource, shlex, shutil, signal, struct
import subprocess, sys, tempfile, time, traceback, warnings, zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

import repopt
from repopt.lab import checkpoint, records
from repopt.grad_mult import GradMult, named_branch, rep_branches
from repopt.models import create_model, initial_scales, merge
from repopt.doctor import check_equivalence
from repopt.optim import attach, clip_grad_norm_, rep_optimizer
from repopt.rules import RULES
from repopt.scales import Scales, extract_scales, load_scales
from repopt.lab.cli import parameters

OK, LIMIT = 0, 60                                   # seconds that a case may take
KINDS, FIXTURES = [], {}
SLOW = ("compiler", "interpreter")                  # kinds that take minutes


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


def cases(*words) -> list:
    "Those of a kind that is one of `words`, or with one of them in their names; without words all"
    inside = [w for w in words if w not in {k for k, _ in KINDS}]
    of = [(k, f) for k, f in KINDS if not words or inside or k in words]
    return [c._replace(kind=k) for k, f in of for c in f()
            if not words or k in words or any(w in c.what for w in inside)]


def case(what, do, exit, *words, **more):
    return Case("", what, do, exit if isinstance(exit, tuple) else (exit,), words, **more)


def fixture(f):
    "What many cases begin with is made once, in a process of its own, and copied: `files={'build': f}`"
    FIXTURES[f.__name__] = f
    def put(path): shutil.copytree(made(f.__name__), path, symlinks=True)
    return put


def made(name):
    "The folder of a fixture, below that of the session"
    if not (folder := SCRATCH/"fixtures"/name/"it").exists():
        folder.mkdir(parents=True)
        seen = forked(lambda: FIXTURES[name](folder), folder.with_name("log"))
        if seen.get("status"): raise RuntimeError(f"fixture {name}: {seen}")
    return folder


# How a case is made to happen

def apart(do) -> str:
    "Do it in a process of its own. What ended that: '', 'hang' or a crash"
    sys.stdout.flush(), sys.stderr.flush()
    if (pid := os.fork()) == 0:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try: do()
        finally: os._exit(0)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)          # workers that it left behind
    if not os.WIFSIGNALED(status): return ""
    ended = signal.Signals(os.WTERMSIG(status))
    return "hang" if ended is signal.SIGALRM else f"crash by {ended.name}"


def forked(work, log, folder=".", env={}, seconds=LIMIT):
    "Do `work` in a process of its own, in `folder`. {'status': exit code, or what ended it, and what it raised}"
    answer = log.with_suffix(".json")
    ended = apart(lambda: answer.write_text(json.dumps(happen(work, log, folder, env, seconds), default=str)))
    return {"status": ended} if ended else json.loads(answer.read_text())


def happen(work, log, folder, env={}, seconds=LIMIT):
    "Do `work` in this process, in `folder`, what it writes in files beside `log`. As `forked` says."
    streams = [open(log.with_suffix(s), "w", encoding="utf-8") for s in (".out", ".err")]
    before, seen = {**os.environ}, {}
    for number, stream in enumerate(streams, 1): os.dup2(stream.fileno(), number)
    kept, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), streams
    os.chdir(folder)
    for k in [k for k in os.environ if k.startswith(("REPOPT_", "SLURM_"))]: del os.environ[k]
    os.environ.update(env)
    signal.alarm(seconds)
    try: seen["status"] = work()
    except SystemExit as e: seen["status"] = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException as e:
        seen |= dict(status="raised", kind=type(e).__name__, text=str(e), trace=traceback.format_exc())
        seen["classes"] = [c.__name__ for c in type(e).__mro__]
    signal.alarm(0)
    sys.stdout, sys.stderr = kept
    os.chdir(SCRATCH)
    os.environ.clear()
    os.environ.update(before)
    for stream in streams:
        with suppress(OSError, ValueError): stream.close()
    return seen


def piped(work, size, log):
    "`work` where a file may have so many bytes; stdout and stderr are pipes, which may have more"
    pipes = [os.pipe() for _ in range(2)]
    for number, (read, write) in enumerate(pipes, 1):
        os.dup2(write, number)
        os.close(write)
        os.set_blocking(read, False)
    kept, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), [open(n, "w", closefd=False) for n in (1, 2)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: return work()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception): stream.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (sys.stdout, sys.stderr) = kept
        for stream, (read, _) in zip(kept, pipes):
            with suppress(BlockingIOError): stream.write(os.read(read, 1 << 16).decode(errors="replace"))


def command(words):
    "The exit code of `python -m repopt <words>`, made in this process"
    from repopt.lab.cli import main
    name, *argv = shlex.split(words)
    sys.argv = [f"python -m repopt {name}", *argv]
    return main([name, *argv])


def found_run(folder) -> str:
    "The id of the run in build/, which `$ID` stands for"
    return next((p.name for p in folder.glob("build/runs/*")), "none")


def perform(c, log, folder):
    """Let the case happen.

    What `forked` says of it; `changed` names the objects that it watched and that are not as they were."""
    watched, path = [], log.with_suffix(".watched")
    def watch(*things):
        watched.extend((x, digest(x)) for x in things)
        return things[0] if len(things) == 1 else things
    def work():
        for m in c.without:
            for loaded in [n for n in sys.modules if n == m or n.startswith(f"{m}.")]: del sys.modules[loaded]
            sys.modules[m] = None
        if c.disk: return piped(lambda: command(c.do.replace("$ID", found_run(folder))), c.disk, log)
        if isinstance(c.do, str): return command(c.do.replace("$ID", found_run(folder)))
        try: c.do(watch)
        finally: path.write_text(" ".join(type(x).__name__ for x, before in watched if digest(x) != before))
        return OK
    env = {"REPOPT_BUILD": str(folder/"build"), "HOSTILE": str(folder), **c.env}
    how = shell if c.shell else forked if alone(c) else happen
    seen = how(c if c.shell else work, log, folder, env, c.seconds)
    return seen | {"changed": path.read_text() if path.exists() else ""}


def alone(c): return bool(c.shell or c.disk or c.without or c.env)


def shell(c, log, folder, env, seconds):
    "The same for a shell's line"
    with open(log.with_suffix(".out"), "wb") as out, open(log.with_suffix(".err"), "wb") as err:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"                   # where `python` is this one
        p = subprocess.Popen(["bash", "-o", "pipefail", "-c", c.do], cwd=folder,
                             env={**os.environ, "PATH": path, **env}, stdout=out, stderr=err,
                             stdin=subprocess.DEVNULL, start_new_session=True)
        try: return {"status": p.wait(seconds)}
        except subprocess.TimeoutExpired: return {"status": "hang"}
        finally:
            with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)


def digest(x) -> str:
    "What is in tensors, modules, optimizers and containers of them"
    h = hashlib.sha256()
    def add(x):
        if isinstance(x, torch.Tensor):
            if x.layout is not torch.strided: x = x.to_dense()
            h.update(f"{x.dtype}{tuple(x.shape)}{x.stride()}".encode()
                     + x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                     if x.numel() and not x.is_meta else f"{x.dtype}{tuple(x.shape)}".encode())
            if isinstance(x, nn.Parameter): add(x.grad)
        elif isinstance(x, nn.Module): add([(n, p) for n,
            p in [*x.named_parameters(), *x.named_buffers()]] + [x.training])
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
    touched = [n for n in sorted({*before,
        *after}) if before.get(n) != after.get(n) and not free(n) and not (ours(n) and n not in before)]
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
    if status not in codes: return ("silent acceptance", (out or err)[-200:]) if status == OK else (f"exit {status}",
            err[-300:])
    if status != OK and isinstance(c.do, str): return said(c, err)
    return finished(c, folder, out)


def said(c, err):
    "Is what was written to stderr one error, in its form?"
    lines = [l for l in err.splitlines() if l.strip() and (l.startswith("error: ") or not re.search(c.also, l))]
    if lines and lines[0].startswith("usage: ") and re.match(r"\S.*: error: ", lines[-1]): return worded(c, lines[-1])
    first, *rest = lines or [""]
    if not first.startswith("error: ") or any(not l.startswith("  ") for l in rest):
        return "unclear", "stderr: " + " ⏎ ".join(lines)[:400]
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

DIGITS = dict(data="digits", num_classes=10, image_size=8, test_size=8, model="repoptvgg_digits",
    strides="[2, 1, 2, 2, 1]", epochs=1, test_epochs=1,
              batch_size=648, lr_batch=64, lr=.01, momentum=.9, nesterov="true", weight_decay="4.0e-5",
              optimizer="sgd", warmup_epochs=0,
              schedule="cosine", label_smoothing=.1, clip_norm="null", bn_batch="null", augment="none",
              precision="fp32", compile="false",
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
    return case(what, "train --recipe r.yaml", exit, *words, files={"r.yaml": text}, **more)


@kind("recipe")
def recipe_files():
    "What a text editor, a mail program and a script leave"
    yield case("no such recipe", "train --recipe nosuch", 2, "nosuch", "digits")
    yield case("almost a recipe's name", "train --recipe digit", 2, "digit", "did you mean 'digits'")
    yield case("no such file", "train --recipe nosuch.yaml", 2, r"nosuch\.yaml")
    yield case("a folder", "train --recipe r.yaml", 2, r"r\.yaml", files={"r.yaml/x": ""})
    yield case("a dangling link", "train --recipe r.yaml", 2, r"r\.yaml", files={"r.yaml": link("gone")})
    yield recipe_case("empty", "", r"r\.yaml")
    yield recipe_case("a comment only", "# lr: 0.1\n", r"r\.yaml")
    yield recipe_case("a list", "- lr\n- 0.1\n", r"r\.yaml")
    yield recipe_case("a word", "digits\n", r"r\.yaml")
    yield recipe_case("a tab", digits() + "a:\n\tb: 1\n", r"r\.yaml", "line 30|tab|\\\\t")
    yield recipe_case("an open bracket", digits(strides="[1, 2"), r"r\.yaml", "line")
    yield recipe_case("an open quote", digits(schedule="'cosine"), r"r\.yaml", "line")
    yield recipe_case("two documents", digits() + "---\n" + digits(), r"r\.yaml")
    yield recipe_case("an anchor that is not there", digits(lr="*peak"), r"r\.yaml", "peak")
    yield recipe_case("a Python object", digits(lr="!!python/object/apply:os.system ['touch pwned']"), r"r\.yaml",
        "python")
    yield recipe_case("latin-1", digits().encode() + b"# caf\xe9\n", r"r\.yaml")
    yield recipe_case("UTF-16", digits(lr="fast").encode("utf-16"), r"r\.yaml|lr")
    yield recipe_case("a NUL byte", digits().encode() + b"\0", r"r\.yaml")
    yield recipe_case("a zip file", b"PK\x03\x04" + bytes(range(256)), r"r\.yaml")
    yield recipe_case("JSON that was cut", json.dumps(DIGITS)[:-20], r"r\.yaml")
    yield recipe_case("a key twice, two values", digits() + "lr: 0.2\n", r"r\.yaml", "lr", "twice|duplicate")
    yield recipe_case("a key twice, one value", digits() + "epochs: 1\n", r"r\.yaml", "epochs", "twice|duplicate")
    yield recipe_case("a number as key", digits() + "1: 2\n", "unknown|key")
    yield recipe_case("null as key", digits() + "null: 2\n", "unknown|key")
    yield recipe_case("no colon", digits() + "lr 0.2\n", r"r\.yaml")
    yield recipe_case("an unknown key", digits() + "colour: red\n", "unknown key", "colour")
    yield recipe_case("an unknown key, near one", digits() + "momentun: 0.9\n", "momentun", "did you mean '?momentum")
    yield recipe_case("a key in capitals", digits() + "LR: 0.9\n", "LR", "did you mean '?lr")
    yield recipe_case("a hyphen for an underscore", digits() + "weight-decay: 0\n", "weight-decay",
        "did you mean '?weight_decay")
    for key in ("data", "lr", "model", "epochs", "num_classes", "optimizer"):
        yield recipe_case(f"lacks {key}", digits(but=[key]), "missing", key)
    for what, name in {"the folder above": "../r", "an absolute path": "/tmp/r", "a folder below": "a/b",
            "nothing": '""', "two dots": '".."',
                       "a number": "3", "null": "null", "a list": "[a]", "a new line": '"a\\nb"',
                       "a NUL": '"a\\0b"'}.items():
        yield recipe_case(f"its name: {what}", digits(name=name), "name")


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
    optimizer | lion | null | 3
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
        """): yield case(f"--set {pair}", f"train --recipe r.yaml --set {shlex.quote(pair)}", 2, *words, files=files)
    for text, value in {"1e-3": 1e-3, "1E-3": 1e-3, "1": 1., "+.5e-2": .5e-2, "1.e-3": 1e-3}.items():
        def after(folder, out,
                value=value): assert asked(folder)["recipe"]["lr"] == value, asked(folder)["recipe"]["lr"]
        yield case(f"lr={text} is {value}", f"train --recipe r.yaml --set lr={text}", OK, files=files, after=after)


def asked(folder) -> dict:
    "What the run in build/ was asked for"
    return json.loads(next((folder/"build").glob("runs/*/record.json")).read_text())["asked"]


# Command lines

@kind("arguments")
def training_arguments():
    yield case("train", "train", 2, "--recipe")
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
        """): yield case(f"train {words}", f"train --recipe r.yaml {words}", 2, *said, files={"r.yaml": digits()})
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
        """): yield case(f"search {words}", f"search --recipe r.yaml {words}", 2, *said,
            files={"r.yaml": digits()})
    yield case("search", "search", 2, "--recipe")
    wild = {"r.yaml": digits(epochs=4, label_smoothing=0, lr="1.0e+30", channels_last="false")}
    for module in ("train", "search"):
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
        speed --batch 100000000 --train digits | GB
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
        quantize | --runs
        quantize --runs | --runs
        quantize --runs nosuch | nosuch
        quantize --runs ../../etc | ../
        quantize --runs '' | run
        quantize --speed nosuch | nosuch
        quantize --speed repoptvgg_digits --size 0 | size
        quantize --speed repoptvgg_digits --size -1 | size
        quantize --speed repoptvgg_digits --size x | --size
        quantize --speed repoptvgg_digits --out a.txt | a.txt
        quantize --runs x --qat-epochs -1 | qat.epochs
        quantize --runs x --qat-rate -1 | qat.rate
        quantize --runs x --qat-rate nan | qat.rate
        quantize --runs x --qat-epochs 1 --qat-batches 0 | qat.batches
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
    for size in ("0", "-1", "x"):
        yield case(f"data pack --size {size}", f"data pack pics to --size {size}", 2, "size",
            files={"pics": two_classes})
    full = {"full/train.part": link("/dev/full"), "full/train.u8.part": link("/dev/full")}
    for what, to, more in (("a file", "a.txt", {"a.txt": "mine"}), ("/proc", "/proc/x", {}),
            ("a full device", "full", full)):
        yield case(f"data pack onto {what}", f"data pack pics {to}", 2, to, files={"pics": two_classes, **more})
    for to in ("/dev/full/x", "d"):
        yield case(f"scales convert onto {to}", f"scales convert s.safetensors {to}", 2, to,
            files={"s.safetensors": scales_file(), "d/x": ""})


# Folders of pictures

@fixture
def two_classes(folder):
    "Two classes of six pictures to train and three to test, 12 pixels and more"
    draw = np.random.default_rng(0)
    for i, (split, n) in enumerate((("train", 6), ("val", 3))):
        for k, name in enumerate(("cat", "dog")):
            (place := folder/split/name).mkdir(parents=True)
            for j in range(n): Image.fromarray(draw.integers(0, 256, (12 + j, 14, 3),
                    np.uint8)).save(place/f"{i}{k}{j}.png")


@fixture
def packed(folder):
    "The same, packed"
    from repopt.lab.packed import pack
    assert pack(made("two_classes"), folder) == dict(train=12, val=6)


@fixture
def caltech(folder):
    "Caltech256 in small: two categories of ten"
    draw = np.random.default_rng(0)
    for name in ("001.ak47", "056.dog"):
        (place := folder/"256_ObjectCategories"/name).mkdir(parents=True)
        for j in range(10): Image.fromarray(draw.integers(0, 256, (9, 9, 3),
                np.uint8)).save(place/f"{name[:3]}_{j:04d}.jpg")


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


BROKEN = "cannot be decoded|broken picture"


@kind("pictures")
def picture_folders():
    "The same folders through both loaders: in memory at 8 pixels, and by workers at 72"
    for size in (8, 72):
        text = pictures(image_size=size, test_size=size)
        def run(what, exit, *said, words="", **files):
            more = {k: files.pop(k) for k in ("after", "seconds", "text") if k in files}
            given = {"r.yaml": more.pop("text", text), **{k.replace("__", "/"): v for k, v in files.items()}}
            return case(f"{what}, at {size} pixels", f"train --recipe r.yaml --data . {words}", exit, *said,
                files=given, also=BROKEN, **more)
        def after(folder, out):
            "Of the six pictures of the test, or those of them that can be read, a whole number is right"
            top1 = json.loads(next((folder/"build").glob("runs/*/record.json")).read_text())["metrics"]["top1"]
            assert abs(top1*6/100 - round(top1*6/100)) < 1e-9, f"top-1 {top1} is not of six pictures"
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
        yield run("a broken one where none may be", 2, "0[01]0.png", "refuse|repair", words="--broken refuse",
            pics=spoilt("train/cat/000.png"))
        yield run("another number of classes", 2, "2 classes", "num_classes=3", pics=two_classes,
            text=pictures(image_size=size, test_size=size, num_classes=3))
        yield run("fewer than a batch", 2, "12", "13", pics=two_classes,
            text=pictures(image_size=size, test_size=size, batch_size=13))
        yield run("a link to a folder above", (OK, 2), "link|loop|train", pics=two_classes,
            pics__train__cat__up=link(".."), after=after)
        yield run("a link to another class", (OK, 2), "link|dog", pics=two_classes,
            pics__train__cat__more=link("../dog"), after=after)
        for what, name, made in (("a text named .png", "train/cat/a.png", "text"),
                ("an empty picture", "train/cat/a.jpg", ""),
                                 ("a cut JPEG", "train/dog/a.jpg", picture("JPEG", cut=200)),
                                 ("a dangling link", "train/cat/a.png", link("gone.png")),
                                 ("a folder named .png", "train/cat/a.png/x", ""),
                                 ("a cut PNG of the test", "val/cat/a.png", picture(cut=100))):
            yield run(what, OK, pics=two_classes, after=after, **{f"pics/{name}": made})
        for what, name, made in (("a notebook's checkpoints", "train/.ipynb_checkpoints/a.png", picture()),
                ("a Mac's .DS_Store", "train/cat/.DS_Store", "x"),
                                 ("a Mac's ._ files", "train/cat/._000.png", "x"),
                                 ("a hidden class", "val/.cache/x", ""),
                                 ("a list beside the classes", "train/list.txt", "a"),
                                 ("pictures a folder deeper", "train/cat/images/a.png", picture()),
                                 ("a palette", "train/cat/a.png", picture(mode="P")),
                                 ("grey", "train/cat/a.png", picture(mode="L")),
                                 ("CMYK", "train/cat/a.jpg", picture("JPEG", mode="CMYK")),
                                 ("a name of another script", "train/cat/猫 é\n.png", picture()),
                                 ("one pixel", "train/cat/a.png", picture(size=(1, 1))),
                                 ("a strip of 1×4000", "train/cat/a.png", picture(size=(1, 4000))),
                                 ("a strip of 4000×1", "train/cat/a.png", picture(size=(4000, 1)))):
            yield run(what, OK, pics=two_classes, after=after, seconds=25, **{f"pics/{name}": made})


def renamed(suffix):
    def put(path):
        two_classes(path)
        for p in path.glob("*/*/*"): p.rename(p.with_suffix(f".{suffix}"))
    return put


@kind("pictures")
def single_pictures():
    "What a picture's pixels become"
    def grey16(watch):
        from repopt.lab.data import load_image_folder
        for split in ("train", "val"):
            for name, value in (("cat", 0), ("dog", 30000)):
                Path(f"pics/{split}/{name}").mkdir(parents=True)
                Image.fromarray(np.full((8, 8), value, np.uint16)).save(f"pics/{split}/{name}/a.png")
        train, _ = load_image_folder("pics", 8)
        mean = train.images[1].float().mean().item()
        assert mean == 30000//257 or abs(mean - 30000/257) < 1.5, f"30000 of 65535 became {mean:.0f} of 255"
    yield case("16 bits of grey", grey16, OK, may=("pics*",))
    def greg(watch):
        from repopt.lab.data import load_caltech256
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
            "index cut": dict(npz=lambda b: b[:-40]), "index empty": dict(npz=b""),
            "index of junk": dict(npz=b"junk"*50), "no index": dict(npz=None),
            "pixels cut": dict(u8=lambda b: b[:-1]), "pixels too many": dict(u8=lambda b: b + b"\0"),
            "no pixels": dict(u8=b""), "label 99 of 2": dict(labels=lambda y: np.where(y == y[0], 99, y)),
            "a label of -1": dict(labels=lambda y: y - 1), "labels of floats": dict(labels=lambda y: y + .5),
            "no labels": dict(labels=None), "fewer labels": dict(labels=lambda y: y[:-1]),
            "places that go back": dict(offsets=lambda o: np.r_[o[:2][::-1], o[2:]]),
            "places of floats": dict(offsets=lambda o: o*1.), "no places": dict(offsets=None),
            "sizes of others": dict(sizes=lambda s: s + 1), "sizes below zero": dict(sizes=lambda s: -s),
            "no sizes": dict(sizes=None), "no classes": dict(classes=None),
            "one class too many": dict(classes=np.array(["cat", "dog", "owl"])),
            "classes that are code": dict(classes=np.array([Evil()], dtype=object))}.items():
        text = pictures(data="packed", image_size=72, test_size=72)
        yield case(f"packed: {what}", "train --recipe r.yaml --data .", 2, "train|3 classes",
            files={"r.yaml": text, "packed": damaged(**parts)})
    def half(path):
        packed(path)
        for p in path.glob("val*"): p.unlink()
    yield case("packed: only train", "train --recipe r.yaml --data .", 2, "val",
        files={"r.yaml": pictures(data="packed", image_size=72, test_size=72), "packed": half})


@kind("pictures")
def other_sets():
    text = digits(data="cifar100", num_classes=100, image_size=32, test_size=32)
    names = ("train", "test", "meta")
    for what, content in (("of nothing", b""), ("of junk", b"junk"), ("of code", pickle.dumps({}))):
        yield case(f"CIFAR-100 {what}", "train --recipe r.yaml --data .", 2, "CIFAR-100", "md5|intact",
            files={"r.yaml": text, **{f"cifar-100-python/{n}": content for n in names}})
    yield case("CIFAR-100 in a file", "train --recipe r.yaml --data .", 2, "CIFAR-100",
        files={"r.yaml": text, "cifar-100-python": "x"})
    text = pictures(data="caltech256")
    yield case("Caltech256 without pictures", "train --recipe r.yaml --data .", 2, "Caltech|256_Object",
        files={"r.yaml": text, "256_ObjectCategories/001.ak47/x": ""})
    yield case("Caltech256 in a file", "train --recipe r.yaml --data .", 2, "Caltech|256_Object",
        files={"r.yaml": text, "256_ObjectCategories": "x"})


class Evil:
    "A pickle of it leaves a file where it is loaded"
    def __reduce__(self): return os.system, ("touch pwned",)


# Files of scales

@cache
def own_scales() -> Scales: return initial_scales("repoptvgg_digits")


def scales_file(head={}, **flat):
    """Our scales of the digits net, with other tensors (None: without) and another header (None: without), signed as
    they are."""
    def put(path):
        tensors = {k: v for k, v in {**own_scales().flat(), **flat}.items() if v is not None}
        h = hashlib.sha256()
        for k, v in sorted(tensors.items()):
            h.update(f"{k}{tuple(v.shape)}{v.dtype}".encode() + v.reshape(-1).view(torch.uint8).numpy().tobytes())
        own = dict(format="1", order=json.dumps(list(dict.fromkeys(k.rpartition("/")[0] for k in tensors))),
            arch="repoptvgg_digits", recipe="sqrt2l", seed="0", accuracy="null", commit="", sha256=h.hexdigest())
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


JUNK = {"nothing": "", "a page of HTML": "<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a pointer of git-lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "junk": bytes(range(256))*9, "a zip of texts": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"),
        "half a zip": cut(torch_file({"a": torch.ones(3)}), 300), "zeros": b"\0"*4096,
        "a pickle of code": pickle.dumps(Evil()), "torch.save of code": torch_file(Evil()), "a TorchScript": script,
        "a numpy archive": lambda path: np.savez(open(path, "wb"), a=np.ones(3)),
        "a folder": lambda path: path.mkdir(), "a dangling link": link("gone"),
        "a link to itself": lambda path: path.symlink_to(path.name), "a list of tensors": torch_file([torch.ones(2)]),
        "a number": torch_file(3),
        "an empty dict": torch_file({}), "numbers by name": torch_file({"model": {"a": 1, "b": 2.}})}
FIRST, SECOND = "stage0.conv.weight", "stage1.0.conv.weight"


@kind("scales file")
def scales_files():
    def bad(what, put, *said, name="s.safetensors", more=""):
        return case(what, f"train --recipe r.yaml --optimizer repsgd --scales {name} {more}", 2,
            *(said or (re.escape(name),)), files={"r.yaml": digits(), name: put})
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
    yield bad("order leaves some out", scales_file({"order": json.dumps([FIRST])}), r"s\.safetensors",
        "order|damaged|stage")
    yield bad("seed is no JSON", scales_file({"seed": "{"}), r"s\.safetensors", "seed|header|damaged")
    for what, v, said in (("NaN", torch.full((n,), torch.nan), "finite"),
            ("inf", torch.full((n,), torch.inf), "finite"), ("one value too many", torch.ones(n + 1), f"{n + 1}"),
            ("two dimensions", torch.ones(n, 1), "shape"),
                          ("a number alone", torch.tensor(1.), "shape"), ("no values", torch.ones(0), "0"),
                          ("integers", torch.ones(n, dtype=torch.int32), "int|damaged"),
                          ("complex", torch.ones(n, dtype=torch.complex64), "complex"),
                          ("booleans", torch.ones(n, dtype=torch.bool), "bool|damaged")):
        yield bad(f"values: {what}", scales_file(**{f"{FIRST}/conv": v}), r"s\.safetensors", said)
    yield bad("a branch that nobody knows", scales_file(**{f"{FIRST}/pool": torch.ones(n)}), "pool")
    yield bad("a branch larger than the kernel", scales_file(**{f"{FIRST}/conv_5x5": torch.ones(n)}), "5")
    yield bad("a name without a branch", scales_file(**{"alone": torch.ones(3)}))
    yield bad("a kernel that the net lacks", scales_file(**{"stage9.conv.weight/conv": torch.ones(3)}),
        "stage9.conv.weight", "no such parameter")
    yield bad("a kernel of the net missing", scales_file(**{f"{SECOND}/{b}": None for b in own_scales()[SECOND]}),
        "stage1.0.conv.weight", "no scales")
    yield bad("of another net", lambda path: initial_scales("repoptvgg_b1").save(path), "fit")
    yield bad("scales for a net of torchvision", good, "fit", more="--model repoptghostnet_digits")
    yield bad("the authors', of another net", torch_file(lambda: authors(initial_scales("repoptvgg_b1"))), "fit",
        name="s.pth")
    yield bad("the authors', with NaN", torch_file(lambda: {**authors(own_scales()),
        "stage0.scale_conv.weight": torch.full((n,), torch.nan)}), "finite", name="s.pth")
    yield bad("the authors', with code", torch_file(lambda: {**authors(own_scales()), "x": Evil()}), name="s.pth")
    yield case("the authors'", "train --recipe r.yaml --optimizer repsgd --scales s.pth", OK,
        files={"r.yaml": digits(), "s.pth": torch_file(lambda: authors(own_scales()))})
    yield case("the authors', converted", "scales convert s.pth o.safetensors", OK,
        files={"s.pth": torch_file(lambda: authors(own_scales()))}, may=("o.safetensors",), after=lambda folder,
        out: converted(folder))
    for what, put in JUNK.items(): yield case(f"scales convert: {what}", "scales convert s.pth o.safetensors", 2,
            r"s\.pth", files={"s.pth": put})


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
    return lambda: {k: v for k, v in {**digits_weights(),
        **{k.replace("__", "."): v for k, v in other.items()}}.items() if v is not None}


@kind("weights file")
def weights_files():
    def run(what, put, exit=2, *said, name="w.pth"):
        return case(what, f"train --recipe r.yaml --weights {name}", exit, *(said or (re.escape(name),)),
            files={"r.yaml": digits(), name: put})
    for what, put in JUNK.items():
        for name in ("w.pth", "w.safetensors"): yield run(f"{what}, named .{name.partition('.')[2]}", put, name=name)
    W = digits_weights()[FIRST]
    for what, v, said in (("NaN", W*torch.nan, "finite|nan"), ("inf", W/0, "finite|inf"),
            ("integers", W.round().long(), "int"), ("bytes", W.to(torch.uint8), "int"), ("booleans", W > 0, "bool"),
            ("complex", W + 0j, "complex"),
                          ("another shape", W[:, :, :1, :1], "stage0"),
                          ("a transposed kernel", W.transpose(0, 1).contiguous(), "stage0"),
                          ("nothing", W[:0], "stage0"), ("sparse", W.to_sparse(), "sparse|layout|stage0"),
                          ("on no device", W.to("meta"), "stage0|meta")):
        yield run(f"a kernel of {what}", torch_file(weights(**{FIRST: v})), 2, r"w\.pth", f"{said}|stage0.conv.weight")
    for what, v in (("NaN", W*torch.nan), ("integers", W.round().long()), ("complex", W + 0j)):
        put = lambda path, v=v: path.write_bytes(safetensors_bytes(weights(**{FIRST: v})()))
        yield run(f"a kernel of {what}, in safetensors", put, 2, r"w\.safetensors", "stage0|finite|int|complex",
            name="w.safetensors")
    yield run("averages of NaN", torch_file(weights(**{"stage0.bn.running_mean": torch.full((len(W),), torch.nan)})),
        2, r"w\.pth", "finite|nan")
    yield run("no classifier", torch_file(weights(**{"linear.weight": None, "linear.bias": None})), 2, r"w\.pth",
        "linear")
    yield run("a kernel missing", torch_file(weights(**{SECOND: None})), 2, r"w\.pth", "stage1.0.conv.weight")
    yield run("a kernel too many", torch_file(weights(**{"stage9.conv.weight": W})), 2, r"w\.pth", "stage9")
    yield run("another number of classes", torch_file(weights(**{"linear.weight": torch.zeros(1000,
        digits_weights()["linear.weight"].shape[1]), "linear.bias": torch.zeros(1000)})), 2, r"w\.pth",
        "1000 classes|linear")
    yield run("another architecture", torch_file(lambda: create_model("repoptghostnet_digits", num_classes=10,
        in_chans=1).state_dict()), 2, r"w\.pth", "fit|differ|features")
    yield run("torchvision's resnet18", torch_file(resnet), 2, r"w\.pth", "fit|differ|layout")
    yield run("an optimizer's state", torch_file(lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), .1,
        .9).state_dict()), 2, r"w\.pth")
    yield run("a whole module", torch_file(lambda: nn.Linear(2, 2)), 2, r"w\.pth")
    yield run("scales", scales_file(), 2, r"w\.safetensors", name="w.safetensors")
    yield run("a dict that holds itself", torch_file(itself), 2, r"w\.pth")
    yield run("with constants.pkl beside its data", added(torch_file(weights()), constants__pkl="x",
        **{"constants.pkl": "x"}), 2, r"w\.pth", "TorchScript|code|constants")
    yield run("with code beside its data", added(torch_file(weights()), code____torch__="x",
        **{"code/__torch__.py": "import os"}), 2, r"w\.pth", "TorchScript|code")
    for what, put in (("as they are", torch_file(weights())),
            ("with code among them", torch_file(lambda: {"model": weights()(), "config": Evil()})),
            ("in the old format", torch_file(weights(), _use_new_zipfile_serialization=False)),
                      ("wrapped twice", torch_file(lambda: {"state_dict": {"model": {f"module.{k}": v for k,
                      v in weights()().items()}}})),
                      ("in half precision", torch_file(lambda: {k: v.half() if v.is_floating_point() else v for k,
                      v in weights()().items()})),
                      ("in double precision", torch_file(lambda: {k: v.double() if v.is_floating_point() else v for k,
                      v in weights()().items()}))):
        yield run(f"good weights {what}", put, OK)
    for mode in ("csla", "hs"): yield case(f"a target's weights as {mode}",
            f"train --recipe r.yaml --weights w.pth --mode {mode}", 2, r"w\.pth",
            files={"r.yaml": digits(), "w.pth": torch_file(weights())})


def resnet():
    import torchvision
    return torchvision.models.resnet18().state_dict()


def itself():
    d = {}
    d["model"] = d
    return d


# Runs that were stopped or finished

def digits_run(folder, *more, kill=0):
    "Make the digits run below `folder`; with `kill`, as one that is asked to stop after so many checkpoints"
    from repopt.lab import cli
    (folder.parent/"r.yaml").write_text(digits(epochs=2))
    os.environ["REPOPT_BUILD"] = str(folder)
    save, times = checkpoint.save, iter(range(1, 99))
    def counted(*a, **k):
        done = save(*a, **k)
        if next(times) == kill: os.kill(os.getpid(), signal.SIGTERM)
        return done
    checkpoint.save = counted
    try: return cli.train(["--recipe", str(folder.parent/"r.yaml"), *more])
    finally: checkpoint.save = save


@fixture
def stopped(folder):
    "A run with two checkpoints"
    with suppress(SystemExit): digits_run(folder, "--save-seconds", "0", kill=2)
    assert len([*folder.glob("runs/*/step-*.pt")]) == 2


@fixture
def finished_run(folder): assert digits_run(folder) == 0


@fixture
def finished_search(folder):
    from repopt.lab import hyper_search
    (folder.parent/"r.yaml").write_text(digits())
    os.environ["REPOPT_BUILD"] = str(folder)
    assert hyper_search.main(["--recipe", str(folder.parent/"r.yaml")]) == 0


def each_step(change, newest=False, of=None):
    "The stopped run, with `change(path)` done to its checkpoints, or to the newest"
    def put(path):
        (of or stopped)(path)
        found = sorted(path.glob("runs/*/step-*.pt"), key=lambda p: int(p.stem[5:]))
        for p in found[-1:] if newest else found: change(p)
    return put


def rewritten(change):
    "A change of a checkpoint's content, signed again"
    def to(path):
        state = change(torch.load(path, weights_only=True))
        torch.save(state, path)
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return to


def lacks(*keys): return rewritten(lambda s: {k: v for k, v in s.items() if k not in keys})
def has(**values): return rewritten(lambda s: {**s, **values})
def shortened(p): p.write_bytes(p.read_bytes()[:-100])
def emptied(p): p.write_bytes(b"")


def foldered(p):
    p.unlink()
    p.mkdir()


@kind("checkpoint")
def checkpoints():
    "The run goes on where it can, and says what it was stopped by where it cannot: nothing is begun again unasked"
    go = "train --recipe r.yaml --save-seconds 0"
    files = {"r.yaml": digits(epochs=2)}
    all_of_them = {
        "cut": shortened, "empty": emptied, "a byte changed": lambda p: flipped(lambda q: None, 2000)(p),
        "no sha256": lambda p: p.with_suffix(".sha256").unlink(),
        "another's sha256": lambda p: p.with_suffix(".sha256").write_text("0"*64),
        "an empty sha256": lambda p: p.with_suffix(".sha256").write_text(""),
        "a newer format": has(format=99), "no format": lacks("format"), "without model": lacks("model"),
        "without optimizer": lacks("optimizer"),
        "without position": lacks("position"), "without asked": lacks("asked"),
        "another run's": has(asked=dict(seed=7)), "a list": rewritten(lambda s: [1, 2]),
        "a number": rewritten(lambda s: 3), "code": rewritten(lambda s: Evil()), "folders": foldered,
        "TorchScript": lambda p: (script(p),
        p.with_suffix(".sha256").write_text(hashlib.sha256(p.read_bytes()).hexdigest())),
        "no tensors in model": has(model={}), "a kernel missing": rewritten(lambda s: {**s,
        "model": {k: v for k, v in s["model"].items() if k != FIRST}}),
        "a kernel of another shape": rewritten(lambda s: {**s, "model": {**s["model"], FIRST: torch.ones(3)}}),
        "an optimizer of others": has(optimizer=dict(state={}, param_groups=[])),
        "an epoch below zero": rewritten(lambda s: {**s, "position": {**s["position"], "epoch": -1}}),
        "a position of words": has(position="here")}
    for what, change in all_of_them.items():
        yield case(f"all: {what}", go, 2, r"step-\d+\.pt",
            "--restart" if "another" not in what or "sha" in what else "", files={**files, "build": each_step(change)},
            also="Warning|warn")
        if what in ("cut", "a newer format", "without model", "code", "folders"):
            yield case(f"all: {what}, begun again", f"{go} --restart", OK, files={**files, "build": each_step(change)},
                may=("build/*",))
    for what in ("cut", "empty", "no sha256", "without model", "no format", "folders"):
        yield case(f"the newest: {what}", go, OK, files={**files, "build": each_step(all_of_them[what], newest=True)},
            may=("build/*",))
    def record(change):
        def put(path):
            finished_run(path)
            for p in path.glob("runs/*/record.json"): change(p)
        return {**files, "build": put}
    for what, change in {"cut": shortened, "empty": emptied, "a list": lambda p: p.write_text("[]"),
            "no metrics": lambda p: p.write_text("{}"), "a folder": foldered,
                         "a number": lambda p: p.write_text("7"),
                         "NaN": lambda p: p.write_text(re.sub(r'"top1": [\d.]+', '"top1": NaN',
                         p.read_text()))}.items():
        yield case(f"the record of a finished run: {what}", "train --recipe r.yaml", 2, r"record\.json",
            files=record(change))
        yield case(f"INT8 of a run whose record is {what}", "quantize --runs $ID", 2, r"record\.json",
            files=record(change))
    yield case("INT8 of a search", "quantize --runs $ID", 2, "search", files={"build": finished_search})
    yield case("INT8 of a run without weights", "quantize --runs $ID", 2, r"final\.safetensors",
        files={"build": without_weights})
    yield case("INT8 of a run with cut weights", "quantize --runs $ID", 2, r"final\.safetensors",
        files={"build": each_file("final.safetensors", shortened)})
    yield case("INT8 onto a file", "quantize --runs $ID --out r.yaml", 2, r"r\.yaml",
        files={**files, "build": finished_run})
    yield case("a run's folder is a file", go, 2, "runs", files={**files, "build/runs": "x"})


def each_file(name, change):
    def put(path):
        finished_run(path)
        for p in path.glob(f"runs/*/{name}"): change(p)
    return put


without_weights = each_file("final.safetensors", lambda p: p.unlink())


# Records

def record(**other) -> str:
    "The text of a record with other values (None: without)"
    return json.dumps({k: v for k, v in {**good_record(), **other}.items() if v is not ...})


@cache
def good_record() -> dict:
    asked = dict(recipe=dict(name="digits"), model="repoptvgg_digits", mode="target", optimizer="sgd", seed=0)
    return records.make_record("train", asked, dict(top1=97.5, loss=.1, best_top1=97.5), [dict(epoch=0, top1=97.5)])


def put_record(**other) -> tuple:
    "(name below out/, text) of the same, as `records.write` names it"
    text = record(**other)
    return f"out/runs/{records.file_name(json.loads(text))}", text


@kind("record")
def record_files():
    good = record()
    own = f"out/runs/{records.file_name(json.loads(good))}"
    for what, text in {
            "cut": good[:-30], "empty": "", "a list": "[]", "a number": "7", "null": "null", "a word": '"train"',
            "UTF-16": good.encode("utf-16"), "junk": bytes(range(256)), "HTML": "<html></html>",
            "of a newer format": record(format=2), "format as text": record(format="1"), "no id": record(id=...),
            "no asked": record(asked=...), "no metrics": record(metrics=...), "no experiment": record(experiment=...),
            "no status": record(status=...), "no where": record(where=...), "an id of others": record(id="0123456789"),
            "an id of a number": record(id=7), "id null": record(id=None),
            "asked changed": good.replace('"seed": 0', '"seed": 1'),
            "NaN": record(metrics=dict(top1=float("nan"))), "inf": record(metrics=dict(top1=float("inf"))),
            "NaN within a list": record(metrics=dict(speedup=2., speedup_quartiles=[1., float("nan")])),
            "a text for a number": record(metrics=dict(top1="97.5")),
            "true for a number": record(metrics=dict(top1=True)),
            "a list for a number": record(metrics=dict(top1=[97.5])), "metrics a list": record(metrics=[97.5]),
            "metrics null": record(metrics=None), "asked a text": record(asked="digits"),
            "asked a list": record(asked=[]),
            "an experiment that nobody knows": record(experiment="dance"),
            "an experiment of a number": record(experiment=3), "epochs of a number": record(epochs=3),
            "epochs with NaN": record(epochs=[dict(top1=float("nan"))]), "where of a list": record(where=[]),
            "status of a number": record(status=1), "a key twice": good[:-1] + ', "metrics": {"top1": 100.0}}',
            "two records": good + good}.items():
        yield case(what, "records --out out", 2, r"a\.json", files={"out/runs/a.json": text})
    yield case("a folder named .json", "records --out out", 2, r"a\.json", files={"out/runs/a.json/x": ""})
    yield case("a dangling link", "records --out out", 2, r"a\.json", files={"out/runs/a.json": link("gone")})
    yield case("runs is a file", "records --out out", 2, "out", files={"out/runs": "x"})
    yield case("one damaged among good ones", "records --out out", 2, r"b\.json",
        files={own: good, "out/runs/b.json": good[:-1]})
    yield case("under another's name", "records --out out", 2, r"a\.json", "copy", files={"out/runs/a.json": good})
    yield case("a good one", "records --out out", OK, files={own: good}, after=lambda folder,
        out: same(len(out.splitlines()), 1))
    def copied(watch):
        Path("out/runs").mkdir(parents=True)
        for name in (own, "out/runs/b.json", "out/runs/copy of a.json"): Path(name).write_text(good)
        same(len(records.find("train", "out")), 1)
    yield case("one record under three names counts once", copied, (OK, ValueError), "copy|twice|same", may=("out*",))
    def means(values): return lambda watch: records.mean_std(values)
    for what, values in {"NaN": [1., float("nan")], "texts": ["1", "2"], "a list": [[1.], [2.]],
            "true": [True, False]}.items():
        yield case(f"the mean of {what}", means(values), ValueError, "number|finite|nan|'1'|true|list")
    yield case("table 13 of the paper", lambda watch: records.paper_table(13), ValueError, "13", "12")
    yield case("table x of the paper", lambda watch: records.paper_table("x"), ValueError, "x", "12")
    yield case("a record of an experiment that nobody knows", lambda watch: records.make_record("dance", {}, {}),
        ValueError, "dance")
    yield case("a record of NaN", lambda watch: records.write(records.make_record("train", {},
        dict(top1=float("nan"))), "out"), ValueError, "top1|finite|nan")


def same(a, b): assert a == b, f"{a} where {b} was right"


# The machine

UNABLE = {"TORCHINDUCTOR_CACHE_DIR=/proc/x": dict(TORCHINDUCTOR_CACHE_DIR="/proc/x"),
    "TORCHINDUCTOR_CACHE_DIR of a file": dict(TORCHINDUCTOR_CACHE_DIR="a.txt"),
    "no compiler": dict(CXX="/nonexistent/c++", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")}


def usable_cache(watch):
    "Where torch's compiler will write"
    records.compiler_cache()
    import torch._inductor.codecache  # noqa: F401
    records.writable(os.environ["TORCHINDUCTOR_CACHE_DIR"], "TORCHINDUCTOR_CACHE_DIR")


def compile_one(watch):
    "What a command does before it compiles, and a net of one layer"
    from repopt.lab.recipes import Recipe
    from repopt.lab.training import compiled
    records.compiler_cache()
    net, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
    close([compiled(net, Recipe.load("digits"))(x)], [net(x)], 1e-6)


@kind("compiler")
def whole_nets_compiled():
    "The same for a whole run: minutes, by `make test-slow`"
    for what, env in UNABLE.items():
        yield case(f"a net of one layer, {what}", compile_one, OK, files={"a.txt": "mine"}, env=env)
        yield case(f"a run, {what}", "train --recipe r.yaml --set compile=true", OK,
            files={"r.yaml": digits(), "a.txt": "mine"}, env=env, seconds=600)


@kind("interpreter")
def interpreters():
    "What an interpreter's own beginning and end may spoil; each takes seconds to start, by `make test-slow`"
    files = {"r.yaml": digits()}
    yield case("a locale of ASCII", "PYTHONIOENCODING=ascii LC_ALL=C python -m repopt records --out out", OK,
        files=dict([put_record()]), shell=True)
    yield case("an error in a locale of ASCII",
        "PYTHONIOENCODING=ascii LC_ALL=C python -m repopt train --recipe 'é'", 2, "unknown recipe", shell=True)
    yield case("records to no stdout", "python -m repopt records --out out >&-", OK, files=dict([put_record()]),
        shell=True)
    yield case("training to a pipe that is closed", "python -m repopt train --recipe r.yaml | true", OK,
        files=files, shell=True)
    yield case("data's usage to a pipe that is closed", "python -m repopt data --help | true", OK, files=files,
        shell=True)
    yield case("no stderr", "python -m repopt train --recipe nosuch 2>&-; test $? = 2", OK, files=files, shell=True)


@kind("environment")
def environments():
    files = {"r.yaml": digits(), "a.txt": "mine"}
    run = "train --recipe r.yaml"
    for place in ("a.txt", "a.txt/x", "/proc/x", "/dev/full", "/dev/null/x"):
        yield case(f"REPOPT_BUILD={place}", run, 2, re.escape(place), files=files, env=dict(REPOPT_BUILD=place))
        yield case(f"hyper_search with REPOPT_BUILD={place}", "search --recipe r.yaml", 2, re.escape(place),
            files=files, env=dict(REPOPT_BUILD=place))
    for value in ("soon", "nan", "-1"): yield case(f"REPOPT_SAVE_SECONDS={value}", run, 2,
            "REPOPT_SAVE_SECONDS|save.seconds", files=files, env=dict(REPOPT_SAVE_SECONDS=value))
    for value in ("nosuch", "a.txt", "/proc/x"): yield case(f"REPOPT_DATA={value}", f"{run} --set data=pics", 2,
            re.escape(value), files=files, env=dict(REPOPT_DATA=value))
    yield case("REPOPT_DATA of nothing", f"{run} --set data=pics", 2, "REPOPT_DATA|data", files=files,
        env=dict(REPOPT_DATA=""))
    yield case("WORLD_SIZE=many", run, 2, "WORLD_SIZE", files=files, env=dict(WORLD_SIZE="many"))
    yield case("RANK without a world", run, (OK, 2), "RANK|WORLD", files=files, env=dict(RANK="x"))
    yield case("SLURM_JOB_ID of words", run, OK, files=files, env=dict(SLURM_JOB_ID="x y"))
    for what, env in UNABLE.items():
        yield case(what, compile_one if "CXX" in env else usable_cache, OK, files=files, env=env)
    many = dict(put_record(asked=dict(seed=k), id=records.run_id(dict(seed=k))) for k in range(400))
    yield case("records to a pipe that is closed", "python -m repopt records --out out | head -n 1", OK, files=many,
        shell=True, after=lambda folder, out: same(len(out.splitlines()), 1))
    yield case("records to a full device", "python -m repopt records --out out > /dev/full", (1, 2),
        "error: .*(space|full)", files=many, shell=True)
    yield case("a disk that takes 100 kB a file", run, (1, 2), "safetensors|written|large|space", files=files,
        disk=100_000, also="Warning|warn")
    yield case("a disk that takes nothing", run, (1, 2), "written|large|space", files=files, disk=1,
        also="Warning|warn")
    yield case("a search on a disk that takes 100 kB a file", "search --recipe r.yaml", (1, 2),
        "safetensors|written|large|space", files=files, disk=100_000, also="Warning|warn")
    yield case("records on a disk that is full", f"{run} --out out", (1, 2), "out|written|large",
        files={**files, "build": finished_run, "r.yaml": digits(epochs=2)}, disk=100, may=("out*",))
    yield case("packing on a disk that takes 500 bytes a file", "data pack pics to", 2, "to",
        files={"pics": two_classes}, disk=500)
    yield case("scales converted on a disk that is full", "scales convert s.safetensors o.safetensors", 2,
        "o.safetensors", files={"s.safetensors": scales_file()}, disk=100)
    pictures_72 = {"r.yaml": pictures(image_size=72, test_size=72), "pics": two_classes}
    for what, words, missing, given, named in (
            ("torchao", "quantize --runs $ID", ("torchao",), {"build": finished_run}, "torchao"),
            ("timm", "speed --infer timm/resnet18", ("timm",), {}, "timm"),
            ("torchvision for vgg16", "speed --infer vgg16", ("torchvision",), {}, "torchvision"),
            ("scikit-learn for digits", run, ("sklearn",), files, "scikit-learn|sklearn"),
            ("torchvision for pictures", "train --recipe r.yaml --data .", ("torchvision",), pictures_72,
            "torchvision"), ("Pillow for pictures", "train --recipe r.yaml --data .", ("PIL",), pictures_72,
            "Pillow|PIL"),
            ("onnx", "quantize --speed repoptvgg_digits", ("onnx",), {}, "onnx"),
            ("onnxruntime", "quantize --speed repoptvgg_digits", ("onnxruntime",), {}, "onnxruntime")):
        yield case(f"without {what}", words, 2, named, "pip install|not installed|needs", files=given, without=missing)


# Optimizers

TEXTBOOK = {"SGD": dict(lr=.05, momentum=.9), "Lion": dict(lr=1e-3)}
COUPLED = ("Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta")


def small() -> nn.Module:
    "A kernel with an identity, one without, and a bias"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, 2, 1)).double()


def small_scales(scale=1.) -> dict:
    net, draw = small(), torch.Generator().manual_seed(1)
    return {f"{n}.weight": {b: torch.rand(4, generator=draw, dtype=torch.double)*scale + .5 for b in rep_branches(m)}
            for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}


def grads(net, seed=0):
    "Gradients for all parameters, the same for the same names"
    for i, (_, p) in enumerate(sorted(net.named_parameters())):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100*seed + i), dtype=p.dtype)


def stepped(opt, net, steps=3):
    for k in range(steps):
        grads(net, k)
        opt.step()
    return [p.detach().clone() for _, p in sorted(net.named_parameters())]


def close(a, b, apart=1e-12):
    for x, y in zip(a, b,
            strict=True):
                assert (x - y).norm() <= apart*y.norm(), f"{float((x - y).norm()/y.norm()):.2g} from the right value"


def spoil(branch=None, value=None, name="0.weight"):
    "The scales with one vector, or one name, of something else"
    s = small_scales()
    if branch: s[name][branch] = value
    else: s[value] = s.pop(name)
    return s


CONSTRUCTION = {
    "no scales at all": (lambda cls, net: cls(net.named_parameters()), "scales"),
    "scales=None": (lambda cls, net: cls(net.named_parameters(), scales=None), "scales"),
    "scales of no kernel": (lambda cls, net: cls(net.named_parameters(), scales={}), "0.weight"),
    "scales by a word": (lambda cls, net: cls(net.named_parameters(), scales="ones"), "scales"),
    "scales as a list": (lambda cls, net: cls(net.named_parameters(), scales=[1., 2.]), "scales"),
    "scales of NaN": (lambda cls, net: cls(net.named_parameters(), scales=spoil("conv", torch.full((4,), torch.nan))),
    "0.weight.*finite"),
    "scales too long": (lambda cls, net: cls(net.named_parameters(), scales=spoil("conv", torch.ones(5))), "0.weight"),
    "scales of two dimensions": (lambda cls, net: cls(net.named_parameters(), scales=spoil("conv", torch.ones(4, 1))),
    "0.weight.*shape"),
    "complex scales": (lambda cls, net: cls(net.named_parameters(), scales=spoil("conv", torch.ones(4) + 1j)),
    "0.weight.*complex"),
    "scales of text": (lambda cls, net: cls(net.named_parameters(), scales=spoil("conv", "ones")), "0.weight"),
    "a branch that nobody knows": (lambda cls, net: cls(net.named_parameters(), scales=spoil("pool", torch.ones(4))),
    "pool"),
    "another kernel's name": (lambda cls, net: cls(net.named_parameters(), scales=spoil(value="9.weight")), "9.weight"),
    "the names of a wrapper": (lambda cls, net: cls(net.named_parameters(),
    scales={f"backbone.{n}": s for n, s in small_scales().items()}), "backbone"),
    "parameters without names": (lambda cls, net: cls(net.parameters(), scales=small_scales()), "named_parameters"),
    "a set of parameters": (lambda cls, net: cls(set(net.parameters()), scales=small_scales()), "set|order|name"),
    "a set of pairs": (lambda cls, net: cls(set(net.named_parameters()), scales=small_scales()), "set|order"),
    "a group that is a set": (lambda cls, net: cls([dict(params=set(net.named_parameters()))], scales=small_scales()),
    "set|order"),
    "a net": (lambda cls, net: cls(net, scales=small_scales()), "named_parameters"),
    "one tensor": (lambda cls, net: cls(net[0].weight, scales=small_scales()), "named_parameters|iterable|name"),
    "a dict of parameters": (lambda cls, net: cls(dict(net.named_parameters()), scales=small_scales()),
    "named_parameters|group"),
    "None": (lambda cls, net: cls(None, scales=small_scales()), "param"),
    "no parameters": (lambda cls, net: cls([], scales=small_scales()), "empty"),
    "a group without parameters": (lambda cls, net: cls([dict(params=[*net.named_parameters()]), dict(lr=.1)],
    scales=small_scales()), "params"),
    "a parameter twice": (lambda cls, net: cls([*net.named_parameters(), ("0.weight", net[0].weight)],
    scales=small_scales()), "twice.*0.weight|0.weight.*twice"),
    "a tensor under two names": (lambda cls, net: cls([*net.named_parameters(), ("tied", net[0].weight)],
    scales=small_scales()), "twice|share|tied"),
    "two kernels of one name": (lambda cls, net: cls([*net.named_parameters(),
    ("module.0.weight", nn.Parameter(net[0].weight.clone()))], scales=small_scales()), "0.weight"),
    "a name that is a number": (lambda cls, net: cls([(0, net[0].weight)], scales=small_scales()), "name"),
    "an activation": (lambda cls, net: cls([(n, p*1) for n, p in net.named_parameters()], scales=small_scales()),
    "leaf|0.weight"),
    "a complex kernel": (lambda cls, net: cls([("0.weight", nn.Parameter(net[0].weight + 0j)),
    ("2.weight", net[2].weight)], scales=small_scales()), "complex.*0.weight|0.weight.*complex"),
    "a sparse parameter": (lambda cls, net: cls([*net.named_parameters(),
    ("e", nn.Parameter(torch.eye(3).to_sparse()))], scales=small_scales()), "sparse.*e|e.*sparse"),
    "integers": (lambda cls, net: cls([("0.weight", torch.ones(4, 4, 3, 3, dtype=torch.int)),
    ("2.weight", net[2].weight)], scales=small_scales()), "0.weight|float|int|dtype"),
    "a learning rate below zero": (lambda cls, net: cls(net.named_parameters(), lr=-1., scales=small_scales()),
    "learning rate"),
    "an option that does not exist": (lambda cls, net: cls(net.named_parameters(), learning=1., scales=small_scales()),
    "learning"),
    "plain of a number": (lambda cls, net: cls(net.named_parameters(), plain=3, scales=small_scales()), "plain"),
}

EVERY = ("scales=None", "scales of NaN", "scales too long", "another kernel's name", "parameters without names",
    "a set of pairs", "no parameters",
         "a group without parameters", "a parameter twice", "a complex kernel", "a sparse parameter",
         "an option that does not exist")


def classes():
    "Every class that is stepped by a rule of its own, and one on explicit branches"
    return [rep_optimizer(c) for c in RULES] + [rep_optimizer(torch.optim.Adafactor)]


def made_of(cls, net, **more):
    return cls(net.named_parameters(), **{**TEXTBOOK.get(cls.torch_class.__name__, {}), "scales": small_scales(),
        **more})


@kind("optimizer built")
def optimizers_built():
    for cls in classes():
        for what, (build, *said) in CONSTRUCTION.items():
            if what not in EVERY and cls.torch_class.__name__ not in ("SGD", "AdamW", "Adafactor"): continue
            def do(watch, cls=cls, build=build): build(cls, watch(small()))
            yield case(f"{cls.__name__}: {what}", do, (ValueError, TypeError), *said)
    for cls in map(rep_optimizer, (c for c in RULES if c.__name__ in COUPLED)):
        def do(watch, cls=cls): made_of(cls, watch(small()), weight_decay=.1)
        yield case(f"{cls.__name__}: coupled decay", do, ValueError, "weight_decay", "exact|decoupled")
    for c, said in ((torch.optim.Optimizer, "Optimizer.*step"),
            (torch.optim.LBFGS, "LBFGS"), (torch.optim.SparseAdam, "SparseAdam"), (nn.Linear, "Linear"),
            ("SGD", "SGD|class"), (None, "None|class"),
            (torch.optim.SGD([nn.Parameter(torch.ones(1))], .1), "SGD|class")):
        yield case(f"rep_optimizer of {getattr(c, '__name__', type(c).__name__)}", lambda watch, c=c: rep_optimizer(c),
            ValueError, said)
    for c, rule in ((torch.optim.SGD, "magic"), (torch.optim.Adafactor, "branch"), (torch.optim.Adam, "gradient")):
        yield case(f"rep_optimizer({c.__name__}, {rule!r})", lambda watch, c=c, rule=rule: rep_optimizer(c, rule),
            ValueError, f"{rule}|{c.__name__}")
    for name, value in (("eps_form", "average"), ("differentiable", True), ("compiled", "no")):
        yield case(f"RepAdamW({name}={value})", lambda watch, name=name,
            value=value: made_of(repopt.RepAdamW, watch(small()), **{name: value}), ValueError, name)
    def zero(watch):
        net = nn.Sequential(nn.Conv2d(4, 0, 3))
        repopt.RepSGD(net.named_parameters(), lr=.1, scales={"0.weight": dict(conv=torch.ones(0))})
    yield case("a kernel of no channels", zero, (OK, ValueError), "0.weight")


def another_class(cls): return repopt.RepAdamW if cls.torch_class is not torch.optim.AdamW else repopt.RepSGD


@kind("optimizer used")
def optimizers_used():
    for cls in classes():
        name, coupled = cls.__name__, cls.torch_class.__name__ in COUPLED
        def used(watch, cls=cls, **more):
            opt = made_of(cls, net := small(), **more)
            stepped(opt, net, 1)
            grads(net, 5)
            return net, watch(opt)
        def closure(watch, used=used):
            net, opt = used(watch)
            def fails(): raise ZeroDivisionError("in the closure")
            opt.step(fails)
        yield case(f"{name}: a closure that raises", closure, ZeroDivisionError, "in the closure")
        def nothing(watch, cls=cls):
            opt = made_of(cls, net := small())
            before = [p.detach().clone() for p in net.parameters()]
            opt.step()
            close([p.detach() for p in net.parameters()], before)
        yield case(f"{name}: no gradients", nothing, OK)
        def sparse(watch, used=used):
            net, opt = used(lambda x: x)
            net[0].weight.grad = net[0].weight.grad.to_sparse()
            watch(opt).step()
        yield case(f"{name}: a sparse gradient", sparse, ValueError, "0.weight", "sparse")
        if coupled:
            def later(watch, used=used):
                net, opt = used(lambda x: x)
                opt.param_groups[0]["weight_decay"] = .1
                watch(opt).step()
            yield case(f"{name}: coupled decay set later", later, ValueError, "weight_decay")
            def loaded(watch, used=used):
                net, opt = used(lambda x: x)
                state = opt.state_dict()
                state["param_groups"][0]["weight_decay"] = .1
                opt.load_state_dict(state)
                watch(opt).step()
            yield case(f"{name}: coupled decay from a state", loaded, ValueError, "weight_decay")
            def group(watch, used=used):
                net, opt = used(watch)
                opt.add_param_group(dict(params=[("b", nn.Parameter(torch.ones(2)))], weight_decay=.1))
            yield case(f"{name}: a group of coupled decay", group, ValueError, "weight_decay")
        def bare(watch, used=used):
            net, opt = used(watch)
            opt.add_param_group(dict(params=[nn.Parameter(torch.ones(4, 4, 3, 3))]))
        yield case(f"{name}: a group without names", bare, ValueError, "name|later|built")
        for what, state, *said in (
                ("torch's own", lambda cls, opt, net: cls.torch_class(net.parameters(),
                **TEXTBOOK.get(cls.torch_class.__name__, {})).state_dict(), "scales"),
                ("of other scales", lambda cls, opt, net: made_of(cls, small(), scales=small_scales(2.)).state_dict(),
                "scales", "0.weight"),
                ("of another class", lambda cls, opt, net: with_state(another_class(cls)), "SGD|AdamW|state|made"),
                ("empty", lambda cls, opt, net: {}, "scales|state"), ("None", lambda cls, opt, net: None, "state"),
                ("a list", lambda cls, opt, net: [1], "state|dict"),
                ("without groups", lambda cls, opt, net: {k: v for k,
                v in opt.state_dict().items() if k != "param_groups"}, "param_groups"),
                ("whose scales are a number", lambda cls, opt, net: {**opt.state_dict(), "scales": 3}, "scales"),
                ("whose groups are numbers", lambda cls, opt, net: {**opt.state_dict(), "param_groups": [3]}, "groups"),
                ("whose state is a list", lambda cls, opt, net: {**opt.state_dict(), "state": [3]}, "state"),
                ("of fewer parameters", lambda cls, opt, net: fewer(cls), "param|group|scales|name|2\\.")):
            def load(watch, used=used, state=state, cls=cls):
                net, opt = used(watch)
                opt.load_state_dict(state(cls, opt, net))
            yield case(f"{name}: a state {what}", load,
                (ValueError, TypeError) if what in ("None", "a list") else ValueError, *said)
        def reordered(watch, cls=cls):
            nets = [small(), small()]
            first = made_of(cls, nets[0])
            stepped(first, nets[0])
            nets[1].load_state_dict(nets[0].state_dict())
            pairs = [*nets[1].named_parameters()]
            second = cls(pairs[::-1], **{**TEXTBOOK.get(cls.torch_class.__name__, {}), "scales": small_scales()})
            second.load_state_dict(deepcopy(first.state_dict()))
            apart = 1e-9 if "NAdam" in cls.__name__ else 1e-12               # torch's keeps a product in float32
            close(stepped(second, nets[1]), stepped(first, nets[0]), apart)
        yield case(f"{name}: a state in another order goes by names, or is refused", reordered, (OK, ValueError),
            "order|name")
        def strided(watch, cls=cls):
            nets = [small(), small()]
            nets[1][0].weight = nn.Parameter(nets[1][0].weight.detach().permute(1, 0, 2, 3).contiguous().permute(1, 0,
                2, 3))
            close(*[stepped(made_of(cls, n), n) for n in nets])
        yield case(f"{name}: a kernel in another order of memory", strided, (OK, ValueError), "contiguous")


@kind("optimizer used")
def options_switched_on_later():
    "An option whose state begins with the first step, set after it, is refused; set before, it counts"
    for cls, option, value in ((repopt.RepAdam, "amsgrad", True), (repopt.RepAdamW, "amsgrad", True),
            (repopt.RepRMSprop, "centered", True), (repopt.RepRMSprop, "momentum", .9),
            *((rep_optimizer(torch.optim.Adam, way), "amsgrad", True) for way in ("explicit", "update"))):
        def late(watch, cls=cls, option=option, value=value):
            opt = made_of(cls, net := small())
            stepped(opt, net, 1)
            grads(net, 5)
            opt.param_groups[0][option] = value
            watch(opt).step()
        yield case(f"{cls.__name__}: {option} switched on later", late, ValueError, f"{option}={value}",
            r"0\.(weight|bias)")
        def soon(watch, cls=cls, option=option, value=value):
            nets = [small(), small()]
            opt = made_of(cls, nets[0])
            opt.state_dict()
            opt.param_groups[0][option] = value
            close(stepped(opt, nets[0]), stepped(made_of(cls, nets[1], **{option: value}), nets[1]))
        yield case(f"{cls.__name__}: {option} switched on before the first step", soon, OK)


def with_state(cls):
    opt = made_of(cls, net := small())
    stepped(opt, net, 1)
    return opt.state_dict()


def fewer(cls):
    net = small()[:1]
    opt = cls(net.named_parameters(), **{**TEXTBOOK.get(cls.torch_class.__name__, {}),
        "scales": {"0.weight": small_scales()["0.weight"]}})
    return opt.state_dict()


# The rest of the library

def sgd(net, **more): return torch.optim.SGD(net.named_parameters(), lr=.05, momentum=.9, **more)


@kind("attach and clip")
def attach_and_clip():
    right = lambda: stepped(repopt.RepSGD((net := small()).named_parameters(), lr=.05, momentum=.9,
        scales=small_scales()), net)
    def bad(what, do, *said, exit=ValueError): return case(what, do, exit, *said)
    for what, opt in {"Adam": lambda net: torch.optim.Adam(net.named_parameters()), "no optimizer": lambda net: net,
            "None": lambda net: None, "a RepOptimizer": lambda net: made_of(repopt.RepSGD, net),
                      "an SGD without names": lambda net: torch.optim.SGD(net.parameters(), .1)}.items():
        yield bad(f"attach to {what}", lambda watch, opt=opt: attach(watch(opt(small())), small_scales()),
            "attach|names|SGD|optimizer")
    for what, scales in {"None": lambda: None, "others": lambda: spoil(value="9.weight"),
            "NaN": lambda: spoil("conv", torch.full((4,), torch.nan)),
            "too long": lambda: spoil("conv", torch.ones(5))}.items():
        yield bad(f"attach with scales {what}", lambda watch, scales=scales: attach(watch(sgd(small())), scales()),
            "scales|weight")
    def twice(watch):
        opt = sgd(net := small())
        for _ in range(2): attach(opt, small_scales())
        close(stepped(opt, net), right())
    def closures(watch):
        opt = sgd(net := small())
        attach(opt, small_scales())
        for k in range(3): opt.step(lambda: grads(net, k))
        close([p.detach() for _, p in sorted(net.named_parameters())], right())
    def copied(watch, copy=deepcopy):
        opt = sgd(net := small())
        attach(opt, small_scales())
        opt2 = copy(opt)
        pairs = {n: p for g in opt2.param_groups for n, p in zip(g["param_names"], g["params"])}
        for k in range(3):
            grads(net, k)
            for n, p in net.named_parameters(): pairs[n].grad = p.grad
            opt2.step()
        close([pairs[n].detach() for n in sorted(pairs)], right())
    def removed(watch):
        opt = sgd(net := small())
        attach(opt, small_scales()).remove()
        close(stepped(opt, net), stepped(sgd(net := small()), net))
    yield case("attach twice is once, or refused", twice, (OK, ValueError), "attach|twice|already")
    yield case("attach and a closure", closures, (OK, ValueError), "closure")
    yield case("a copy of an attached optimizer", copied, (OK, ValueError, TypeError), "attach|copy|copied|pickle")
    yield case("an attached optimizer, pickled", lambda watch: copied(watch, lambda o: pickle.loads(pickle.dumps(o))),
        (OK, ValueError, TypeError), "attach|copy|pickle")
    yield case("attached and removed", removed, OK)
    def ready(watch, make=lambda net: made_of(repopt.RepSGD, net)):
        net = small()
        opt = make(net)
        grads(net)
        return watch(opt)
    for what, norm in {"-1": -1., "NaN": float("nan"), "a word": "one", "None": None}.items():
        yield bad(f"clip_grad_norm_ to {what}", lambda watch, norm=norm: clip_grad_norm_(ready(watch), norm),
            "max_norm", exit=(ValueError, TypeError))
    for what, opt in {"torch's SGD": sgd, "a net": lambda net: net, "None": lambda net: None}.items():
        yield bad(f"clip_grad_norm_ of {what}", lambda watch, opt=opt: clip_grad_norm_(opt(small()), 1.),
            "RepOptimizer|optimizer", exit=(ValueError, TypeError))
    def infinite(watch):
        net = small()
        opt = made_of(repopt.RepSGD, net)
        grads(net)
        net[0].weight.grad[0] = torch.inf
        clip_grad_norm_(watch(opt), 1., error_if_nonfinite=True)
    yield case("clip_grad_norm_ of inf, as an error", infinite, RuntimeError, "norm", "inf|nan|finite")
    yield case("clip_grad_norm_ without gradients", lambda watch: same(float(clip_grad_norm_(made_of(repopt.RepSGD,
        small()), 1.)), 0.), OK)


def block(op=None, branches=None, **scales):
    op = op if op is not None else nn.Conv2d(4, 4, 3, padding=1)
    return repopt.Block(op, branches if branches is not None else rep_branches(nn.Conv2d(4, 4, 3, padding=1)), scales)


@kind("scales, blocks, nets")
def library():
    from repopt.scales import unwrapped
    C, b = nn.Conv2d, dict(conv=torch.ones(4))
    def bad(what, do, *said, exit=ValueError): return case(what, lambda watch: do(), exit, *said)
    for what, m, *said in (("None", None, "scales|mapping|None"), ("a list", [1], "scales|mapping|list"),
            ("a number", 3, "scales|mapping|int"), ("a number for branches", {"a": 3}, "a"),
            ("no branches", {"a": {}}, "a", "branches"), ("a word for values", {"a": dict(conv="x")}, "a"),
                           ("None for values", {"a": dict(conv=None)}, "a"), ("a number as name", {1: b}, "1|name"),
                           ("branches of other lengths", {"a": dict(conv=torch.ones(3), identity=torch.ones(2))}, "a",
                           "length"), ("a branch of words", {"a": {"pool 3": torch.ones(2)}}, "pool 3"),
                           ("inf", {"a": dict(conv=torch.tensor([torch.inf]))}, "finite"),
                           ("two names that become one", {"conv.weight": b, "_orig_mod.conv.weight": b}, "conv.weight"),
                           ("a file for a mapping", "s.safetensors", "scales|mapping|load")):
        yield bad(f"Scales of {what}", lambda m=m: Scales(m), *said)
    for how in ("zeros", None, 3): yield bad(f"Scales.initial(how={how!r})",
            lambda how=how: Scales.initial(small(), how), "how", "ones")
    yield bad("Scales.initial of no conv", lambda: Scales.initial(nn.Linear(2, 2)), "conv")
    yield bad("Scales.initial of None", lambda: Scales.initial(None), "model|Module", exit=(ValueError, TypeError))
    def start(**more): return lambda watch: Scales(small_scales()).reinitialize_(watch(more.pop("net", small())),
            **more)
    yield case("reinitialize_ of another net", start(net=nn.Sequential(C(3, 3, 3))), ValueError, "0.weight|2.weight")
    yield case("reinitialize_(init='xavier')", start(init="xavier"), ValueError, "init", "xavier")
    yield case("reinitialize_(identity='none')", start(identity="none"), ValueError, "identity", "none")
    for name in ("nosuch", "../../README", "", "repoptvgg_digits.safetensors", None,
            3): yield bad(f"load_scales({name!r})", lambda name=name: load_scales(name), "scales|name",
            "repoptvgg_digits")
    yield bad("load_scales of a near name", lambda: load_scales("repoptvgg_digit"),
        "did you mean '?repoptvgg_digits|there are: repoptvgg_digits")
    yield bad("extract_scales of a target", lambda: extract_scales(small()), "hs|Hyper-Search")
    for name in ("pool", "conv_3", "conv_0x0", "conv_-1x1", "", "Conv", "conv_axb", None,
            3): yield bad(f"named_branch({name!r})",
            lambda name=name: named_branch(name).view(torch.zeros(4, 4, 3, 3)), "branch")
    for what, scales, shape, *said in (("None", None, (4, 4, 3, 3), "scales"),
            ("nothing", {}, (4, 4, 3, 3), "scales|branch"),
            ("other lengths", dict(conv=torch.ones(5)), (4, 4, 3, 3), "conv", "5"),
            ("a larger branch", dict(conv_5x5=torch.ones(4)), (4, 4, 3, 3), "5"),
            ("an even branch", dict(conv_2x2=torch.ones(4)), (4, 4, 3, 3), "2"),
                                       ("an identity of 5 to 4", dict(identity=torch.ones(5)), (5, 4, 3, 3),
                                       "identity"), ("numbers", dict(conv=1.), (4, 4, 3, 3), "conv"),
                                       ("a shape of words", b, "abcd", "shape")):
        yield bad(f"GradMult of {what}", lambda scales=scales, shape=shape: GradMult(scales, shape), *said,
            exit=(ValueError, TypeError) if shape == "abcd" else ValueError)
    for what, do, *said in (("a ReLU", lambda: block(nn.ReLU()), "ReLU"),
            ("None", lambda: repopt.Block(None, {}), "None"),
            ("a transposed conv", lambda: block(nn.ConvTranspose2d(4, 4, 3)), "ConvTranspose2d"),
            ("padding by mirrors", lambda: block(C(4, 4, 3, padding=1, padding_mode="reflect")), "padding_mode"),
                            ("no branches", lambda: block(branches={}), "branch"),
                            ("words for branches", lambda: block(branches=dict(conv="conv")), "conv"),
                            ("scales of others", lambda: block(pool=1.), "pool"),
                            ("scales too long", lambda: block(conv=torch.ones(5)), "conv", "5"),
                            ("scales of NaN", lambda: block(conv=float("nan")), "conv", "finite"),
                            ("scales of words", lambda: block(conv="one"), "conv"),
                            ("an identity at stride 2", lambda: block(C(4, 4, 3, 2, 1)), "identity", "stride"),
                            ("an identity from 3 to 4", lambda: block(C(3, 4, 3, padding=1)), "channels"),
                            ("a 5×5 beside 3×3", lambda: block(branches=dict(conv=repopt.Conv(5))), "5"),
                            ("a 2×2 beside 3×3", lambda: block(branches=dict(conv=repopt.Conv(2))), "2"),
                            ("a lazy conv", lambda: block(nn.LazyConv2d(4, 3)), "lazy|Lazy|shape"),
                            ("complex scales", lambda: block(conv=torch.ones(4) + 1j), "conv", "complex")):
        yield bad(f"a Block of {what}", do, *said)
    for what, more, *said in (("nosuch", dict(name="nosuch"), "nosuch", "repoptvgg_b1"),
            ("a near name", dict(name="repoptvgg_b11"), "did you mean '?repoptvgg_b1"),
            ("no name", dict(name=""), "model"), ("None", dict(name=None), "None|name"),
            ("mode", dict(mode="train"), "train", "csla"), ("strides", dict(strides=(1, 1)), "strides"),
            ("strides of 0", dict(strides=(0,)*5), "strides"),
                              ("strides of words", dict(strides="22222"), "strides"),
                              ("no classes", dict(num_classes=0), "num_classes"),
                              ("classes below zero", dict(num_classes=-1), "num_classes"),
                              ("no channels", dict(in_chans=0), "in_chans"), ("init", dict(init="zeros"), "zeros"),
                              ("scales", dict(mode="hs", scales="zeros"), "zeros"),
                              ("scales of others", dict(mode="csla", scales=small_scales()), "0.weight|fit"),
                              ("RepVGG as hs", dict(name="repvgg_digits", mode="hs"), "repvgg_digits")):
        yield bad(f"create_model: {what}", lambda more=more: create_model(**{"name": "repoptvgg_digits", **more}),
            *said)
    def tied():
        a = C(3, 3, 3)
        return nn.Sequential(a, nn.ReLU(), a)
    for what, net, more, *said in (("no convs", lambda: nn.Linear(2, 2), {}, "conv"),
            ("None", lambda: None, {}, "None|Module|model"), ("a tied kernel", tied, {}, "share"),
            ("a lazy conv", lambda: nn.Sequential(nn.LazyConv2d(3, 3)), {}, "lazy"),
            ("a rule of others", small, dict(rule="zeros"), "zeros"),
            ("an init of others", small, dict(init="zeros"), "zeros"),
                                   ("all plain", small, dict(plain=["*"]), "plain"),
                                   ("even kernels only", lambda: nn.Sequential(C(3, 3, 2)), {}, "2×2|even"),
                                   ("an hs model", lambda: create_model("repoptvgg_digits", "hs"), {},
                                   "conv|already|Hyper-Search")):
        yield case(f"to_hyper_search of {what}", lambda watch, net=net,
            more=more: repopt.to_hyper_search(net(), **more), ValueError, *said)
    def subclass(watch):
        class Twice(C):
            def forward(self, x): return 2*super().forward(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hs = repopt.to_hyper_search(nn.Sequential(Twice(3, 3, 3), C(3, 3, 3)))
        assert type(hs[0]) is Twice and "0.weight" in hs.plain, "a conv with a forward of its own was replaced"
    yield case("to_hyper_search of a conv with a forward of its own", subclass, OK)
    def doctor(**more):
        def do(watch):
            net = nn.Sequential(small(), nn.Flatten())
            scales = {f"0.{n}": s for n, s in small_scales().items()}
            given = dict(optimizer=lambda p, s: repopt.RepSGD(p, lr=.01, scales=s),
                batches=[(torch.randn(2, 4, 4, 4), torch.randint(9, (2,))) for _ in range(3)])
            check_equivalence(watch(net), more.pop("scales", scales), **{**given, **more})
        return do
    for what, more, *said in (("no batches", dict(batches=[]), "batch"),
            ("batches of images only", dict(batches=[torch.randn(2, 4, 4, 4)]*3), "batch|pair|\\(x, y\\)"),
            ("a stock optimizer", dict(optimizer=lambda p, s: torch.optim.SGD(p, .1)), "SGD", "RepOptimizer"),
                              ("None for an optimizer", dict(optimizer=None), "optimizer"),
                              ("no steps", dict(steps=0), "steps"),
                              ("images of other channels",
                              dict(batches=[(torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))]*3),
                              "channels|batch|input"),
                              ("images of NaN", dict(batches=[(torch.full((2, 4, 4, 4), torch.nan),
                              torch.zeros(2, dtype=torch.long))]*3), "finite|nan"),
                              ("no scales", dict(scales={}), "scales")):
        yield case(f"check_equivalence with {what}", doctor(**more), ValueError, *said)
    explicit = rep_optimizer(torch.optim.SGD, "explicit")
    yield case("check_equivalence with an explicit optimizer", doctor(optimizer=lambda p, s: explicit(p, lr=.01,
        scales=s)), OK)
    for what, net, exit, *said in (("nothing to merge", small, OK, ""),
            ("None", lambda: None, (ValueError, TypeError), "None|Module|model")):
        yield case(f"merge of {what}", lambda watch, net=net: merge(net()), exit, *said)
    for name, expected in {"module.conv.weight": "conv.weight", "_orig_mod.module.conv.weight": "conv.weight",
            "backbone.module.conv.weight": "backbone.module.conv.weight",
            "mymodule.conv.weight": "mymodule.conv.weight"}.items():
        yield case(f"the own name of {name}", lambda watch, name=name,
            expected=expected: same(unwrapped([name])[name], expected), OK)


@kind("weights in Python")
def weights_in_python():
    for what, put in JUNK.items():
        for f in (checkpoint.foreign_weights, Scales.load, Scales.from_released):
            def do(watch, f=f, put=put):
                lay(Path("."), {"x.pth": put})
                f("x.pth")
            yield case(f"{f.__name__.strip('_')}: {what}", do, ValueError, r"x\.pth", may=("x.pth", "x.pth/*"))
    for f in (checkpoint.foreign_weights, Scales.load, Scales.from_released, checkpoint.load):
        for path in ("nosuch", "", None):
            yield case(f"{f.__name__.strip('_')}({path!r})", lambda watch, f=f, path=path: f(path),
                (ValueError, TypeError) if path is None else ValueError,
                "nosuch" if path else "file|folder|path|directory")


# Notebooks

@kind("notebook")
def notebook_parameters():
    names = ("recipe model data seeds epochs batch_size out resume arms optimizer scales search gpus nodes broken "
             "weights dry_run")
    own = dict(recipe="digits", model=None, data=None, seeds=1, epochs=None, batch_size=None, out=None, resume=True,
        search=None)
    for what, more, *said in (
            ("an unknown parameter", dict(colour="red"), "colour"),
            ("almost a parameter", dict(epoch=3), "did you mean '?epochs"), ("no runs", dict(seeds=0), "seeds"),
            ("runs below zero", dict(seeds=-1), "seeds"), ("half a run", dict(seeds=1.5), "seeds"),
            ("runs by a word", dict(seeds="three"), "seeds"), ("true runs", dict(seeds=True), "seeds"),
            ("a list of runs", dict(seeds=[0, 1]), "seeds"),
            ("no such recipe", dict(recipe="nosuch"), "nosuch"),
            ("almost a recipe", dict(recipe="digit"), "did you mean '?digits"),
            ("no recipe", dict(recipe=None), "recipe"), ("a recipe of a number", dict(recipe=3), "recipe"),
            ("no such model", dict(model="nosuch"), "nosuch"), ("a model of a number", dict(model=3), "model"),
            ("no epochs", dict(epochs=0), "epochs"), ("epochs below zero", dict(epochs=-1), "epochs"),
            ("half an epoch", dict(epochs=.5), "epochs"), ("epochs by a word", dict(epochs="many"), "epochs"),
            ("no batch", dict(batch_size=0), "batch_size"),
            ("a batch by a word", dict(batch_size="max"), "batch_size"),
            ("no such search", dict(search="nosuch"), "nosuch"),
            ("a search of a number", dict(search=3), "search|recipe"), ("records into a number", dict(out=3), "out"),
            ("records into a file", dict(out="a.txt"), "a.txt|out"),
            ("records into /proc", dict(out="/proc/x"), "/proc/x"),
            ("resume by a word", dict(resume="maybe"), "resume"), ("data of a number", dict(data=3), "data"),
            ("data that is not there", dict(data="nosuch", recipe="cifar"), "nosuch")):
        yield case(what, lambda watch, more=more: parameters({**own, **more}, names), ValueError, *said,
            files={"a.txt": "mine"})


@kind("plan")
def plans():
    from repopt.lab.plan import gpus_for, plan
    from repopt.lab.recipes import Recipe
    for gpus in ("many", 0, -1, True, 1.5, None): yield case(f"gpus={gpus!r}", lambda watch,
            gpus=gpus: gpus_for(gpus, Recipe.load("digits")), ValueError, "gpus")
    for what, more, *said in (("no such recipe", dict(recipe="nosuch"), "nosuch"),
            ("no such model", dict(model="nosuch"), "nosuch"), ("no such mode", dict(mode="train"), "train"),
            ("no such optimizer", dict(optimizer="sdg"), "sdg"), ("no GPU", dict(gpus=0), "gpus"),
            ("GPUs below zero", dict(gpus=-1), "gpus"), ("no node", dict(nodes=0), "nodes"),
            ("3 for a batch of 64", dict(gpus=3), "batch_size=64"),
                              ("no data", dict(recipe="cifar", data="nosuch"), "nosuch"),
                              ("a RepOptimizer without scales", dict(optimizer="repsgd"), "scales"),
                              ("records into a file", dict(out="a.txt"), "a.txt")):
        yield case(what, lambda watch, more=more: plan(**{"recipe": "digits", **more}), ValueError, *said,
            files={"a.txt": "mine"})
    from repopt.lab.runs import run
    for what, more, *said in (("device", dict(device="abacus"), "abacus"), ("seed", dict(seed="x"), "seed"),
            ("mode", dict(mode="train"), "train"), ("optimizer", dict(optimizer="sdg"), "sdg"),
            ("recipe", dict(recipe=None), "recipe"), ("a recipe as a dict", dict(recipe=dict(lr=1)), "recipe"),
            ("scales of a word", dict(optimizer="repsgd", scales="ones"), "scales"),
            ("scales for SGD", dict(scales=small_scales()), "scales"),
                              ("gpus", dict(gpus=0), "gpus"), ("nodes", dict(nodes=0), "nodes"),
                              ("broken", dict(broken="maybe"), "broken"),
                              ("reinitialize without scales", dict(reinitialize=True), "scales"),
                              ("save_seconds", dict(save_seconds=-1), "save_seconds"),
                              ("out", dict(out="a.txt"), "a.txt")):
        yield case(f"run: {what}", lambda watch, more=more: run(**{"recipe": "r.yaml", **more}), ValueError, *said,
            files={"r.yaml": digits(), "a.txt": "mine"})


# INT8

def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5)).eval()


def images(n=32, *shape, seed=0): return torch.randn(n, *(shape or (3, 8, 8)),
        generator=torch.Generator().manual_seed(seed))


@cache
def quantized():
    "One that many cases export, and leave as it is"
    from repopt.quantization import quantize
    return quantize(tiny(), images())


@kind("INT8")
def int8_inputs():
    from repopt.deployment import export_int8
    from repopt.quantization import quantize, quantize_aware
    x, y = images(), torch.randint(5, (32,), generator=torch.Generator().manual_seed(0))
    alone = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    class Branching(nn.Module):
        def forward(self, x): return x if x.sum() > 0 else -x
    nan = x.clone()
    nan[3] = torch.nan
    for what, net, data, *said in (("a net in training", tiny().train(), x, "eval"),
            ("None", None, x, "None|Module|model"), ("a path", "net.pth", x, "str|Module|model"),
            ("a search", create_model("repoptvgg_digits", "hs").eval(), x, "CSLA|merge"),
            ("RepVGG's branches", create_model("repvgg_digits").eval(), x, "reparameterize"),
            ("no conv", alone, x, "conv"), ("a forward that asks its input", Branching().eval(), x, "export|follow"),
                                   ("31 images", tiny(), x[:31], "31"), ("no images", tiny(), [], "0|image"),
                                   ("None for images", tiny(), None, "loader|images|None"),
                                   ("a number for images", tiny(), 3, "loader|images|int"),
                                   ("images of NaN", tiny(), nan, "finite"),
                                   ("one channel", tiny(), images(32, 1, 8, 8), "channel|batch|export"),
                                   ("integers", tiny(), (x*50).to(torch.uint8), "float|uint8"),
                                   ("no dimension", tiny(), [torch.tensor(1.)], "image|dimension|shape"),
                                   ("words for images", tiny(), ["a"], "image|str"),
                                   ("dicts without images", tiny(), [dict(a=1)], "image|dict"),
                                   ("a kernel of NaN", spoilt_net(), x, "finite|nan")):
        yield case(f"quantize: {what}", lambda watch, net=net, data=data: quantize(watch(net), data), ValueError, *said)
    for key, value in dict(weights="per_row", activations="mean",
            images=0).items(): yield case(f"quantize({key}={value!r})", lambda watch, key=key,
            value=value: quantize(tiny(), x, **{key: value}), ValueError, key if key == "images" else str(value))
    def near(data):
        def do(watch):
            net = tiny()
            assert (quantize(net, data)(x) - net(x)).norm() < .1*net(x).norm(), "far from the float net"
        return do
    for what, data in (("batches of one", [x[i:i + 1] for i in range(32)]),
            ("pairs", [(x[:16], y[:16]), (x[16:], y[16:])]), ("a last batch of one", [x[:31], x[31:]]),
            ("dicts", [dict(image=x, label=y)]), ("double precision", x.double())):
        yield case(f"quantize on {what}", near(data), (OK, ValueError), "image|dict|float64|double|batch")
    for what, train, more, *said in (("no batches", [], {}, "batch"), ("a generator", iter([(x, y)]), {}, "length"),
            ("no epochs", [(x, y)], dict(epochs=0), "epoch"), ("a rate below zero", [(x, y)], dict(lr=-1), "lr"),
            ("a rate of NaN", [(x, y)], dict(lr=float("nan")), "lr"),
            ("images without labels", [x], {}, "label|pair|\\(x, y\\)"), ("None", None, {}, "batch|None|train"),
            ("labels of others", [(x, y + 7)], {}, "label|class|target")):
        yield case(f"quantize_aware: {what}", lambda watch, train=train,
            more=more: quantize_aware(watch(tiny()), train, **{"epochs": 1, **more}), ValueError, *said)
    for what, path, *said in (("no folder", "no/such/a.onnx", "no/such"), ("a folder", "d", "d"),
            ("/dev/full/x", "/dev/full/x", "/dev/full"), ("/proc", "/proc/x.onnx", "/proc"),
            ("nothing", "", "path|place|file")):
        yield case(f"export_int8 to {what}", lambda watch, path=path: export_int8(watch(quantized()), path),
            ValueError, *said, files={"d/x": ""})
    yield case("export_int8 of a float net", lambda watch: export_int8(tiny(), "a.onnx"), ValueError, "quantize",
        "Sequential")
    for what, test, *said in (("no batches", [], "empty|image"),
            ("batches of nothing", [(x[:0], y[:0])], "empty|image"),
            ("another number of channels", [(images(4, 1, 8, 8), y[:4])], "channel|shape|image"),
            ("fewer labels", [(x, y[:3])], "label"), ("words", ["a"], "image|str|pair")):
        yield case(f"export_int8 tested on {what}", lambda watch,
            test=test: export_int8(watch(quantized()), "a.onnx", test), ValueError, *said)
    yield case("export_int8", lambda watch: same(export_int8(quantized(), "a.onnx", [(x, y)])["images"], 32),
        OK, may=("a.onnx",))
    yield case("torch.save of an INT8 net", lambda watch: torch.save(quantized(), "a.pth"),
        (OK, ValueError, TypeError), "export_int8|saved|pickle", may=("a.pth",))


def spoilt_net():
    net = tiny()
    with torch.no_grad(): net[0].weight[0] = torch.nan
    return net


def lay(folder, files):
    "Put `files` into `folder`"
    for name, content in files.items():
        (path := folder/name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content): content(path)
        else: path.write_bytes(content.encode() if isinstance(content, str) else content)


def play(played, say=lambda *a: None) -> list:
    "[(case, verdict, what was seen)] of cases, as many as can be in one process. `say` is called with each"
    for name in PACKAGES: importlib.import_module(name)                        # once for all
    done = []
    while rest := played[len(done):]:
        if alone(rest[0]): some = [(rest[0], *play_here(rest[0], len(done)))]
        else:
            upto = next((i for i, c in enumerate(rest) if alone(c)), len(rest))
            some = play_together(rest[:upto], len(done))
        for answer in some: say(*answer)
        done += some
    return done


def play_together(some, number) -> list:
    "The same in one process, as far as that comes"
    answers = SCRATCH/"answers"
    def do():
        with open(answers, "w") as f:
            for i, c in enumerate(some, number): print(json.dumps(play_here(c, i)), file=f, flush=True)
    ended = apart(do)
    found = [(c, *json.loads(line)) for c, line in zip(some, answers.read_text().splitlines())]
    if len(found) < len(some): found.append((some[len(found)], ended or "crash", "it ended the process"))
    return found


def play_here(c, number) -> tuple:
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
    p.add_argument("-k", metavar="WORD", default=[], action="append", help="a kind, or a word of the cases' names; "
                   "may be given again")
    p.add_argument("-l", "--list", action="store_true", help="print the cases, play none")
    p.add_argument("-v", "--verbose", action="store_true", help="print what each case said, and its seconds")
    a = p.parse_args(argv)
    began, counts, wrong = time.time(), defaultdict(Counter), []
    def say(c, verdict, seen):
        if a.verbose: print(f"{verdict}: {c.kind}: {c.what}: {seen}", flush=True)
    if a.list: print(*(f"{c.kind}: {c.what}" for c in cases(*a.k)), sep="\n")
    for c, verdict, seen in [(c, "listed", "") for c in cases(*a.k)] if a.list else play(cases(*a.k), say):
        counts[c.kind][verdict] += 1
        if verdict not in ("handled", "listed"): wrong.append((verdict, c, seen))
    print(*(f"{v}: {c.kind}: {c.what}: {seen}" for v, c, seen in wrong), sep="\n", end="\n" if wrong else "")
    for k, seen in counts.items(): print(f"{k:20} {sum(seen.values()):4}  " + ", ".join(f"{n} {v}" for v,
            n in seen.most_common()))
    total = sum(counts.values(), Counter())
    print(f"{sum(total.values())} cases of {len(counts)} kinds in {time.time() - began:.0f} s: {total['handled']} "
          f"handled")
    print(f"{total['traceback']} tracebacks, {total['silent acceptance']} silent acceptances")
    return 1 if wrong or not total else 0


PACKAGES = ("sklearn.datasets", "torchvision.datasets", "torchao.quantization.pt2e.quantize_pt2e",
    "repopt.quantization")
SCRATCH = Path(tempfile.mkdtemp(prefix="hostile-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
torch.set_num_threads(1)

if __name__ == "__main__": sys.exit(main())
