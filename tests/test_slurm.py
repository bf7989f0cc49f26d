"""On a real Slurm that the tests start: requeued and preempted runs end in the same bits, and the whole graph of notebooks runs through `profiles/slurm`."""
import json, os, shlex, shutil, subprocess, sys, time
from pathlib import Path

import pytest

import slurm
from repopt.distributed import command
from test_interrupt import finish, left, same_bits

ROOT, TESTS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())


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
    script.write_text(f"#!/bin/bash\nexport REPOPT_BUILD={build} PHASE={build}/phase PYTHONPATH={TESTS}:{ROOT} OMP_NUM_THREADS=1\nexec {shlex.join(command(args, module='killed_run'))}\n")
    return say(env, "sbatch", "--parsable", "--requeue", "--open-mode=append", "-p", partition, "--exclusive", "-o", f"{build}/log", str(script))


@pytest.mark.parametrize("how,processes", [("requeue", 1), ("preemption", 1), ("preemption", 2)])
def test_a_disturbed_job_ends_in_the_same_bits(env, tmp_path, how, processes):
    calm, build, epochs = tmp_path/"calm", tmp_path/"disturbed", ("--set", "epochs=4")
    finish(calm, processes, *epochs)
    job = submit(env, build, "low", processes, *epochs)
    seen = lambda: f"{state(env, job)}: {(build/'log').read_text() if (build/'log').exists() else 'no log'}"
    wait(lambda: list(build.glob("runs/*/step-*.sha256")), seen)
    if how == "requeue": say(env, "scontrol", "requeue", job)
    else: say(env, "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: state(env, job) in ("COMPLETED", "FAILED", "CANCELLED"), seen)
    log = (build/"log").read_text()
    assert state(env, job) == "COMPLETED" and "goes on from step-" in log, seen()
    assert same_bits(left(build), left(calm))


def test_the_graph_of_notebooks_runs_with_one_job_preempted(env, tmp_path):
    home = tmp_path/"repopt"; home.mkdir()
    for name in ("nbs", "repopt", "profiles"): shutil.copytree(ROOT/name, home/name)
    for name in ("Snakefile", "settings.ini"): shutil.copy(ROOT/name, home)
    env = {**env, "OMP_NUM_THREADS": "1", "REPOPT_SAVE_SECONDS": "0.2", "PYTHONPATH": str(home)}; env.pop("REPOPT_BUILD", None)
    cpus = os.cpu_count()
    small = ["--set-threads", *(f"{r}={cpus}" for r in ("hyper_search", "train", "quantize")), "--set-resources", *(f"{r}:gres='gpu:1'" for r in ("hyper_search", "train", "quantize"))]
    p = subprocess.Popen([sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", "--config", "seeds=1", "epochs=2", *small], cwd=home, env=env,
                         stdout=open(tmp_path/"log", "w"), stderr=subprocess.STDOUT)
    said = lambda: (tmp_path/"log").read_text()[-4000:] + say(env, "squeue", "-t", "all")
    running = lambda: p.poll() is not None or list(home.glob("build/runs/*/step-*.sha256"))
    wait(running, said, 300)
    say(env, "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: p.poll() is not None, said, 900)
    assert p.returncode == 0, said()
    assert (home/"figures"/"table4.md").exists() and len(list(home.glob("figures/runs/train-digits-*.json"))) == 5
    restarts = [l for l in say(env, "scontrol", "show", "job").split() if l.startswith("Restarts=")]
    assert "Restarts=1" in restarts, restarts
