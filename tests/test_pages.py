"""What the pages promise: README's lines as they stand, notebooks started anywhere,
and `make reproduce` in any folder and after any kill.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import forks
import repopt
from repopt.lab import records
from run import project_notebooks
from repopt.lab.recipes import Recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/"README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", README)
CODE = [line.strip() for line in README.splitlines() if line.startswith("    ")] + INLINE
PROGRAMS = re.compile(r"(make|papermill|snakemake|python -m repopt \w+) ")
COMMANDS = [c.partition("  #")[0].strip() for c in CODE if PROGRAMS.match(c)]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENV.pop("PYTEST_CURRENT_TEST", None)


def do(*words, cwd=ROOT, **env):
    return subprocess.run([str(w) for w in words], cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=300)


# README

@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_python_runs_as_it_stands(block, tmp_path):
    r = do(sys.executable, "-c", block, cwd=tmp_path)
    assert r.returncode == 0 and "loss" in r.stdout, r.stderr


# the module's own parser sees the words, and then it ends
PARSE = """import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def only(self, *a, **k): parse(self, *a, **k); print("parsed"); sys.exit(0)
argparse.ArgumentParser.parse_args = only
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""


@pytest.fixture(scope="module")
def parsed():
    "{command: what became of it}, of those that begin with python"
    own = [c for c in dict.fromkeys(COMMANDS) if c.startswith("python ")]
    return dict(zip(own, forks.each([(PARSE, shlex.split(c)[2:], ROOT) for c in own], **ENV)))


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_is_one_that_its_program_takes(command, parsed):
    program, *words = shlex.split(command)
    if program == "make":
        r = do("make", "-n", *words)
        assert r.returncode == 0, r.stderr
    elif program == "snakemake":
        r = do(sys.executable, "-m", "snakemake", "-n", "-p", *words)
        assert r.returncode == 0 and "papermill nbs/" in r.stdout + r.stderr, r.stderr
    elif program == "papermill":
        from papermill.cli import papermill
        from papermill.inspection import _infer_parameters
        from papermill.iorw import load_notebook_node
        given = papermill.make_context("papermill", words).params
        known = {p.name for p in _infer_parameters(load_notebook_node(str(ROOT/given["notebook_path"])))}
        assert {k for k, _ in given["parameters"]} <= known
    else:
        r = parsed[command]
        assert "parsed" in r.stdout, r.stderr
    for recipe in re.findall(r"recipe[= ](\w+)", command): Recipe.load(recipe)


def test_names_in_readme_are_there():
    assert COMMANDS and BLOCKS
    for name in [c for c in INLINE if c.startswith("repopt.")]: getattr(repopt, re.match(r"repopt\.(\w+)", name)[1])
    notebooks = {p.stem for p in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    assert set(re.findall(r"`(\d\w+)`", README)) == notebooks
    assert set(re.findall(r"`lab/(\w+)`", README)) == {p.stem for p in (ROOT/"nbs/lab").glob("[a-z]_*.ipynb")}
    targets = {c.split()[1] for c in CODE if c.startswith("make ")}
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(), re.M))


def test_what_papermill_is_told_to_write_is_ignored_and_notebooks_are_not():
    if not (ROOT/".git").exists(): pytest.skip("no git here")
    ignored = lambda *paths: do("git", "check-ignore", "--no-index", *paths).stdout.split()
    written = ["out.ipynb", "mine.ipynb", "nbs/out.ipynb", "nbs/b1.ipynb", "nbs/lab/out.ipynb"]
    assert ignored(*written) == written
    assert not ignored("nbs/index.ipynb", *(f"nbs/{p.name}" for p in (ROOT/"nbs").glob("[0-9]*.ipynb")),
                       *(f"nbs/lab/{p.name}" for p in (ROOT/"nbs/lab").glob("[a-z]_*.ipynb")))


# make reproduce

def cell(source, *tags):
    return dict(cell_type="code", id=f"c{len(source)}", metadata=dict(tags=[*tags]), execution_count=None, outputs=[],
                source=source)


def notebook(*cells):
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))


SAYS = """import pathlib, time
folder = pathlib.Path(out); folder.mkdir(exist_ok=True)
while (folder/"wait").exists(): time.sleep(.05)
with open(folder/"said", "a") as f: print(recipe, seeds, out, file=f)"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project in a folder whose name no shell takes unquoted, with an environment without scripts.

    In the notebooks' place are some that only say what they were given.
    """
    home = tmp_path_factory.mktemp("pages")/"a \"reader's\" $HOME & näh"
    home.mkdir()
    for name in ("Makefile", "Snakefile", "settings.ini", "setup.py", "requirements.lock"): shutil.copy(ROOT/name, home)
    for name in ("profiles", "repopt"): shutil.copytree(ROOT/name, home/name)
    (home/"nbs").mkdir()
    empty = cell("recipe = model = seeds = out = data = search = epochs = None", "parameters")
    for p in (ROOT/"nbs").glob("0[4567]_*.ipynb"): (home/"nbs"/p.name).write_text(notebook(empty, cell(SAYS)))
    assert do(sys.executable, "-m", "venv", "--without-pip", home/".venv").returncode == 0
    packages, = (home/".venv/lib").glob("python3*/site-packages/")
    (packages/"all.pth").write_text(sysconfig.get_path("purelib"))
    (home/".venv/.ready").touch()
    (home/"figures").mkdir()
    return home


@pytest.mark.parametrize("asked", ["SEEDS=0", "SEEDS=two", "SEEDS=1.5", "EPOCHS=0"])
def test_reproduce_refuses_numbers_that_mean_nothing(clone, asked):
    r = do("make", "-s", "reproduce", asked, cwd=clone)
    assert r.returncode == 2 and f"error: {asked.lower()} must be a whole number" in r.stderr, r.stderr
    assert "Traceback" not in r.stderr


def words(process):
    "Its command line; nothing of one that has gone meanwhile"
    try: return process.cmdline()
    except psutil.Error: return []


@contextlib.contextmanager
def reproducing(clone):
    "make reproduce and all processes behind it, once a notebook's kernel runs"
    p = subprocess.Popen(["make", "reproduce", "SEEDS=2"], cwd=clone, env=ENV, text=True, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE)
    family, deadline = [], time.time() + 60
    try:
        while not any("ipykernel_launcher" in " ".join(words(q)) for q in family):
            assert p.poll() is None and time.time() < deadline, p.stderr.read()
            time.sleep(.1)
            with contextlib.suppress(psutil.Error):
                family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
        yield family
    finally:
        for q in family:
            with contextlib.suppress(psutil.Error): q.kill()
        p.wait(30)


def test_reproduce_in_a_folder_of_any_name_and_after_any_kill(clone):
    (clone/"figures/wait").touch()
    for killed in ("make", "snakemake"):
        with reproducing(clone) as family:
            beside = do("make", "-s", "reproduce", cwd=clone)
            assert beside.returncode == 2 and "error: another call is at work" in beside.stderr
            next(q for q in family if killed in words(q)).send_signal(signal.SIGKILL)
            left = psutil.wait_procs(family[1:], timeout=20)[1]
            assert not left, [words(q) for q in left]
    (clone/"figures/wait").unlink()
    r = do("make", "reproduce", "SEEDS=2", cwd=clone)
    assert r.returncode == 0 and "5 of 5 steps (100%) done" in r.stdout + r.stderr, r.stderr
    assert (clone/"figures/said").read_text() == f"digits 2 {clone}/figures\n"*4
    again = do("make", "reproduce", "SEEDS=2", cwd=clone)
    assert "Nothing to be done" in again.stdout + again.stderr


# notebooks

BOOKS = {str(p.relative_to(ROOT/"nbs")) for p in project_notebooks()}


def code_of(book):
    cells = json.loads((ROOT/"nbs"/book).read_text())["cells"]
    return "".join(line for c in cells if c["cell_type"] == "code" for line in (*c["source"], "\n"))


@pytest.mark.parametrize("book", sorted(BOOKS))
def test_no_notebook_looks_for_the_project_beside_its_working_folder(book):
    assert not re.findall(r"""["']\.\./""", code_of(book))


@pytest.mark.parametrize("book", sorted(BOOKS))
def test_no_notebook_leaves_another_default_dtype_to_the_next_in_its_worker(book):
    """nbdev_test has as many processes as it was given workers, and each runs one notebook after the other.

    What stands in a function is not seen here: it puts back what it sets."""
    own = re.findall(r"^(?:torch\.)?(set_default_(?:dtype|device|tensor_type))\((.*?)\)", code_of(book), re.M)
    assert not own or own[-1] == ("set_default_dtype", "torch.float32"), own


def papermill(source, tmp_path, cwd, *parameters, **env):
    "(what papermill said, what the notebook printed)"
    (tmp_path/"in.ipynb").write_text(json.dumps(source))
    words = tmp_path/"in.ipynb", tmp_path/"out.ipynb", "--no-progress-bar", *parameters
    r = do(sys.executable, "-m", "papermill", *words, cwd=cwd, **env)
    cells = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    return r, "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", ()))


def only(book, words):
    "The notebook's cells before its first section, and the one with `words`"
    nb = json.loads((ROOT/"nbs"/book).read_text())
    first = next(i for i, c in enumerate(nb["cells"]) if "".join(c["source"]).startswith("## "))
    return {**nb, "cells": [*nb["cells"][:first], next(c for c in nb["cells"] if words in "".join(c["source"]))]}


def test_the_paper_finds_the_records_from_anywhere(tmp_path):
    book, n = only("07_paper.ipynb", "load_all(source)"), len(list((ROOT/"figures/runs").glob("*.json")))
    for folder in (ROOT, tmp_path):
        r, said = papermill(book, tmp_path, folder)
        assert r.returncode == 0 and f"{n} records in figures/runs" in said, r.stderr


def test_the_paper_is_not_made_of_nothing(tmp_path):
    (tmp_path/"runs").mkdir()
    source = "".join(only("07_paper.ipynb", "load_all(source)")["cells"][-1]["source"])
    with pytest.raises(ValueError, match="runs holds no records: make some"):
        exec(source, dict(p=SimpleNamespace(out=str(tmp_path)), Path=Path, records=records))



def test_figures_of_a_search_join_no_two_stages_and_show_each():
    from repopt.lab import report
    found = [r for r in records.load_all(ROOT/"figures") if r["experiment"] == "search"]
    for ax in report.figures(found)[7].axes:
        seen = [(int(min(x)), int(max(x)) + 1) for x in (line.get_xdata() for line in ax.lines) if len(x)]
        assert set(seen) == {(0, 1), (1, 5), (5, 11), (11, 27), (27, 28)}
        assert [t.get_text() for t in ax.get_xticklabels()] == [f"stage {k}" for k in range(5)]


ADDED = """from repopt import RepNAdam
from repopt.lab.training import OPTIMIZERS
OPTIMIZERS["repnadam"] = lambda g, r, **rep: RepNAdam(g, lr=1e-3, decoupled_weight_decay=True, **rep)"""


def test_training_from_the_root_of_an_added_optimizer_with_one_seed(tmp_path):
    nb = json.loads((ROOT/"nbs/05_train_imagenet.ipynb").read_text())
    at = next(i for i, c in enumerate(nb["cells"]) if "p = parameters(globals()" in "".join(c["source"]))
    nb["cells"].insert(at + 1, cell(ADDED))
    env = dict(IN_TEST="1", REPOPT_BUILD=str(tmp_path/"build"))
    r, said = papermill(nb, tmp_path, ROOT, "-p", "optimizer", "repnadam", **env)
    assert r.returncode == 0, r.stderr
    first, second, *_ = said.splitlines()
    assert first.startswith("recipe digits: repoptvgg_digits") and "-p recipe imagenet -p data" in second
    assert "left out: plain, repvgg, because OPTIMIZERS has no 'nadam'" in said
    assert said.count("verdict") == 1 and "one seed gives no verdict" in said
    assert "RepNAdam, searched" in (tmp_path/"out.ipynb").read_text()
