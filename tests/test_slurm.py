"""On a real Slurm that the tests start: requeued and preempted runs end in the same bits."""
import shlex, subprocess, time
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
