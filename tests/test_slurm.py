"""On a real Slurm that the tests start: requeued and preempted runs end in the same bits."""
import shlex, shutil, subprocess, sys, time
from functools import cache
from pathlib import Path

import psutil
import pytest

import slurm
from repopt.lab.distributed import command
from repopt.lab.plan import plan
from repopt.lab.recipes import Recipe
from test_interrupt import finish, left, same_bits
from test_pages import cell, notebook

ROOT, TESTS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
pytestmark = [pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()), pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def env():
    with slurm.cluster() as env: yield env


def say(env, *words): return subprocess.run(words, env=env, capture_output=True, text=True).stdout.strip()


def wait(true, what, seconds=180):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, f"waited {seconds} s for {what()}"
        time.sleep(.1)


def state(env, job): return say(env, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def submit(env, build, partition, processes, *more):
    "The digits run as a job; its id"
    build.mkdir(parents=True)
    args = ["--recipe", "digits", "--save-seconds", "0.1", "--set", "batch_size=32", "--gpus", str(processes), *more]
    script = build/"job.sh"
    script.write_text(f"#!/bin/bash\nexport REPOPT_BUILD={build} PHASE={build}/phase PYTHONPATH={TESTS}:{ROOT} "
                      f"OMP_NUM_THREADS=1\nexec {shlex.join(command(args, module='killed_run'))}\n")
    return say(env, "sbatch", "--parsable", "--requeue", "--open-mode=append", "-p", partition, "--exclusive", "-o",
               f"{build}/log", str(script))


EPOCHS = ("--set", "epochs=4")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "What the run leaves, in one process and in two, that nobody disturbed: {processes: function}"
    def made(processes):
        build = tmp_path_factory.mktemp("calm")
        finish(build, processes, *EPOCHS)
        return left(build)
    return cache(made)


@pytest.mark.parametrize("how,processes", [("requeue", 1), ("preemption", 1),
                                           pytest.param("preemption", 2, marks=pytest.mark.slow)])
def test_a_disturbed_job_ends_in_the_same_bits(env, tmp_path, calm, how, processes):
    """Two processes are slow: the same by a signal to the launcher, without Slurm, is in tests/test_interrupt.py,
    test_a_signal_ends_it_with_75_and_the_same_bits[SIGUSR1-training-2]."""
    build = tmp_path/"disturbed"
    job = submit(env, build, "low", processes, *EPOCHS)
    seen = lambda: f"{state(env, job)}: {(build/'log').read_text() if (build/'log').exists() else 'no log'}"
    wait(lambda: list(build.glob("runs/*/step-*.sha256")), seen)
    if how == "requeue": say(env, "scontrol", "requeue", job)
    else: say(env, "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: state(env, job) in ("COMPLETED", "FAILED", "CANCELLED"), seen)
    log = (build/"log").read_text()
    assert state(env, job) == "COMPLETED" and "goes on from step-" in log, seen()
    assert same_bits(left(build), calm(processes))


def test_the_line_of_the_dry_run_is_one_that_slurm_takes(env, tmp_path):
    "Two processes on the node's two GPUs on paper; the job ends with its result"
    line = plan(Recipe.load("digits", epochs=2), gpus=2, time_it=False, out=str(tmp_path))[-1].strip()
    words = shlex.split(line)
    assert words[0] == "sbatch"
    job = say({**env, "REPOPT_BUILD": str(tmp_path/"build"), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"},
              *words, "--parsable", "-o", f"{tmp_path}/log")
    wait(lambda: state(env, job) in ("COMPLETED", "FAILED", "CANCELLED"),
         lambda: f"{state(env, job)}: {(tmp_path/'log').read_text()}")
    text = (tmp_path/"log").read_text()
    assert state(env, job) == "COMPLETED" and "2 processes" in text and ": top-1 " in text, text
    assert list(tmp_path.glob("runs/*.json")), text


def graph(env, home, *config):
    "Snakemake over the project in `home`, its jobs on the partition that is preempted"
    words = ["--profile", "profiles/slurm", "figures", "--config", "recipe=digits", "seeds=1",
             f"out={home.parent}/figures", *config, "--default-resources", "slurm_partition=low", "mem_mb=0",
             "runtime=60", "--seconds-between-status-checks", "2", "--slurm-init-seconds-before-status-checks", "2",
             "--set-threads", "hyper_search=1", "train=1", "quantize=1", "--set-resources", "train:gres='gpu:2'"]
    env = {**env, "REPOPT_BUILD": str(home.parent/"build"), "REPOPT_SAVE_SECONDS": "0.5", "OMP_NUM_THREADS": "1",
           "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    return subprocess.Popen([sys.executable, "-m", "snakemake", *words], cwd=home, env=env,
                            stdout=open(home.parent/"log", "w"), stderr=subprocess.STDOUT)


def preempted_once(env, g, home, training, go_on=lambda: None, seconds=1200):
    "Preempt the graph's job that is `training`: it alone is begun again, all end well, and no process stays behind"
    said = lambda: f"{say(env, 'squeue', '-t', 'all', '-o', '%i %T %j %k')}\n{(home.parent/'log').read_text()}"
    ours = lambda: [j for j in say(env, "scontrol", "show", "job").split("\n\n") if f"WorkDir={home}" in j]
    again = lambda: [j for j in ours() if "Restarts=1" in j]
    try:
        wait(lambda: training() or g.poll() is not None, said, seconds)
        say(env, "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        wait(lambda: again() or g.poll() is not None, said)
        go_on()
        assert g.wait(seconds) == 0, said()
    finally: g.kill()
    assert len(again()) == 1 and "rule_train" in again()[0] and all("Restarts=0" in j for j in ours()
                                                                    if j not in again()), said()
    left_behind = lambda: [q for q in psutil.process_iter(["environ"])
                           if (q.info["environ"] or {}).get("REPOPT_BUILD") == str(home.parent/"build")]
    wait(lambda: not left_behind(), left_behind, 60)


SAYS = """import pathlib, time
folder = pathlib.Path(out); folder.mkdir(exist_ok=True)
if {name!r} == "05_train_imagenet":
    (folder/"begun").touch()
    while (folder/"wait").exists(): time.sleep(.05)
with open(folder/"said", "a") as f: print({name!r}, recipe, seeds, file=f)"""


def test_the_graph_runs_to_the_end_though_a_job_is_preempted(env, tmp_path):
    "The graph and its profile as they are, over notebooks that only say that they ran"
    home, out = tmp_path/"repopt", tmp_path/"figures"
    for name in ("profiles", "repopt"): shutil.copytree(ROOT/name, home/name)
    shutil.copy(ROOT/"Snakefile", home)
    (home/"nbs").mkdir()
    out.mkdir()
    (out/"wait").touch()
    given = cell("recipe = model = seeds = out = data = search = epochs = None", "parameters")
    for p in (ROOT/"nbs").glob("0[4567]_*.ipynb"):
        (home/"nbs"/p.name).write_text(notebook(given, cell(SAYS.format(name=p.stem))))
    preempted_once(env, graph(env, home), home, (out/"begun").exists, (out/"wait").unlink, 300)
    assert (out/"said").read_text().splitlines() == [
        f"{name} digits 1" for name in ("04_hyper_search", "05_train_imagenet", "06_quantization", "07_paper")]


@pytest.mark.slow
def test_the_digits_graph_runs_to_the_end_though_a_job_is_preempted(env, tmp_path):
    """The whole chain, one seed and short runs, as jobs. Training is interrupted by a job of a higher partition, goes
    on, and leaves no process behind.

    Fast: test_the_graph_runs_to_the_end_though_a_job_is_preempted has the same graph and jobs over empty notebooks,
    test_a_disturbed_job_ends_in_the_same_bits a training that is preempted."""
    home, runs = tmp_path/"repopt", tmp_path/"build"
    for f in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines():
        if (ROOT/f).exists():
            (home/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, home/f)
    searched = home/"build/marks/digits/04_hyper_search.done"
    preempted_once(env, graph(env, home, "epochs=6"), home,
                   lambda: searched.exists() and list(runs.glob("runs/*/step-*.sha256")))
    assert (tmp_path/"figures/table9.md").exists()
