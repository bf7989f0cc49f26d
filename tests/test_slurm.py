"""On a real Slurm that the tests start: requeued and preempted runs end in the same bits."""
import shlex, shutil, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

import slurm
from repopt.lab.distributed import command
from repopt.lab.plan import plan
from repopt.lab.recipes import Recipe
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
    script.write_text(f"#!/bin/bash\nexport REPOPT_BUILD={build} PHASE={build}/phase PYTHONPATH={TESTS}:{ROOT} "
                      f"OMP_NUM_THREADS=1\nexec {shlex.join(command(args, module='killed_run'))}\n")
    return say(env, "sbatch", "--parsable", "--requeue", "--open-mode=append", "-p", partition, "--exclusive", "-o",
               f"{build}/log", str(script))


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


def test_the_digits_graph_runs_to_the_end_though_a_job_is_preempted(env, tmp_path):
    """The whole chain, one seed and runs of half their length, as jobs.

    Training is interrupted by one of a higher partition, goes on, and leaves no process behind."""
    home, runs = tmp_path/"repopt", tmp_path/"build"
    for f in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines():
        if (ROOT/f).exists():
            (home/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, home/f)
    env = {**env, "REPOPT_BUILD": str(runs), "REPOPT_SAVE_SECONDS": "0.5", "OMP_NUM_THREADS": "1",
           "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    graph = subprocess.Popen([sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", "figures", "--config",
                              "recipe=digits", "seeds=1", "epochs=20", f"out={tmp_path}/figures", "--default-resources",
                              "slurm_partition=low", "mem_mb=0", "runtime=60", "--seconds-between-status-checks", "2",
                              "--slurm-init-seconds-before-status-checks", "2", "--set-threads", "hyper_search=1",
                              "train=1", "quantize=1", "--set-resources", "train:gres='gpu:2'"], cwd=home, env=env,
                              stdout=open(tmp_path/"log", "w"), stderr=subprocess.STDOUT)
    said = lambda: f"{say(env, 'squeue', '-t', 'all', '-o', '%i %T %j %k')}\n{(tmp_path/'log').read_text()}"
    searched = home/"build/marks/digits/04_hyper_search.done"
    training = lambda: (searched.exists() and list(runs.glob("runs/*/step-*.sha256")) or graph.poll() is not None)
    wait(training, said, 600)
    say(env, "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    try: assert graph.wait(1200) == 0, said()
    finally: graph.kill()
    jobs = say(env, "scontrol", "show", "job").split("\n\n")
    assert sum("rule_train" in j and "Restarts=1" in j
               for j in jobs) == 1 and (tmp_path/"figures/table9.md").exists(), said()
    left_behind = lambda: [q for q in psutil.process_iter(["environ"])
                           if (q.info["environ"] or {}).get("REPOPT_BUILD") == str(runs)]
    wait(lambda: not left_behind(), left_behind, 60)
