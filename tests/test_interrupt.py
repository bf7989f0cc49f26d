"""Runs that are killed, stopped, starved of disk and fed damaged files, in one process and in two: they end in the bits
of a run that nobody disturbed.

`python tests/test_interrupt.py --kills 20 --out figures` makes the long version and leaves its record.
"""
import argparse, hashlib, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from repopt.lab import checkpoint, records
from repopt.lab.distributed import command

TESTS = Path(__file__).resolve().parent


def start(build, processes=1, *more, **env):
    "The digits run, as its own session: `build` holds all that it leaves"
    build.mkdir(parents=True, exist_ok=True)
    (build/"phase").unlink(missing_ok=True)
    env = {**os.environ, "REPOPT_BUILD": str(build), "PHASE": str(build/"phase"),
           "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1",
           "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1", **env}
    args = ["--recipe", "digits", "--save-seconds", "0.1", "--set", "batch_size=32", *more]
    return subprocess.Popen(command(args, processes, module="killed_run"), env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(build, processes=1, *more, code=0, **env):
    "Run to the end; its output"
    p = start(build, processes, *more, **env)
    text = p.communicate(timeout=600)[0]
    assert p.returncode == code, text
    return text


def until(p, build, phase, timeout=300):
    "Wait until the run says `phase`; False if it ended before"
    deadline = time.time() + timeout
    while time.time() < deadline and p.poll() is None:
        if (build/"phase").exists() and (build/"phase").read_text() == phase: return True
        time.sleep(.002)
    return False


def kill(p, which):
    """SIGKILL `which` of the run's processes: 'all', 'launcher', 'worker' (one of them).

    Then wait until nothing of it is left."""
    family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    workers = [q for q in family if q.pid != p.pid] or family
    for q in dict(all=family, launcher=family[:1], worker=workers[-1:])[which]: q.send_signal(signal.SIGKILL)
    p.communicate(timeout=300)
    psutil.wait_procs(family, timeout=60)


def left(build):
    "(weights, optimizer state, log rows, metrics) of the finished run"
    record = json.loads(next(build.glob("runs/*/record.json")).read_text())
    return load_file(next(build.glob("runs/*/final.safetensors"))), torch.load(
        build/"phase.optimizer", weights_only=True), record["epochs"], record["metrics"]


def same_bits(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def drive(folder, kills, processes, seed=0, epochs=None, calm=None):
    """Kill a run `kills` times, let it end, and hold it against a calm one, or against what one has left.

    The record's metrics."""
    chance, hits, epochs = random.Random(seed), Counter(), ["--set", f"epochs={epochs or 2 + kills//2}"]
    calm = calm or start(folder/"calm", processes, *epochs)
    while sum(hits.values()) < kills:
        p, want = start(folder/"killed", processes, *epochs), ("training", "saving",
                                                               "evaluating")[sum(hits.values()) % 3]
        assert until(p, folder/"killed", want), f"the run ended before it could be killed: {hits}, {p.communicate()[0]}"
        time.sleep(chance.random()*(.3 if want == "training" else .004))
        was = (folder/"killed"/"phase").read_text()
        kill(p, chance.choice(["all", "launcher", "worker"]) if processes > 1 else "all")
        hits[was or want] += 1
    text = finish(folder/"killed", processes, *epochs)
    if isinstance(calm, subprocess.Popen):
        out = calm.communicate(timeout=600)[0]
        assert calm.returncode == 0, out
        calm = left(folder/"calm")
    assert "goes on from step-" in text, text
    return dict(kills=kills, processes=processes, bitwise_equal=same_bits(left(folder/"killed"), calm),
                **{f"while_{k}": n for k, n in sorted(hits.items())})


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "{processes: what a run of two epochs leaves that nobody disturbed}"
    build = tmp_path_factory.mktemp("calm")
    runs = {n: start(build/str(n), n, *TWO) for n in (1, 2)}
    for p in runs.values():
        text = p.communicate(timeout=600)[0]
        assert p.returncode == 0, text
    return {n: left(build/str(n)) for n in runs}


TWO = ("--set", "epochs=2")


# in training, while it saves and while it evaluates; of two processes, each start of which takes three, once
@pytest.mark.parametrize("processes,kills", [(1, 3), (2, 1)])
def test_killed_anywhere_it_ends_in_the_same_bits(tmp_path, calm, processes, kills):
    got = drive(tmp_path, kills, processes, epochs=2, calm=calm[processes])
    assert got["bitwise_equal"] and got["kills"] == kills, got


@pytest.mark.slow
@pytest.mark.xdist_group("interrupt-2")
def test_two_processes_killed_anywhere_end_in_the_same_bits(tmp_path):
    "Fast: test_killed_anywhere_it_ends_in_the_same_bits has one process, and one kill of two"
    got = drive(tmp_path, 4, 2)
    assert got["bitwise_equal"] and got["kills"] == 4, got


@pytest.mark.parametrize("signum,phase,processes", [(signal.SIGTERM, "evaluating", 1), (signal.SIGUSR1, "training", 2)])
def test_a_signal_ends_it_with_75_and_the_same_bits(tmp_path, calm, signum, phase, processes):
    more = (*TWO, "--gpus", str(processes))  # the launcher takes the signal, its workers save
    p = start(tmp_path, 1, *more)
    assert until(p, tmp_path, phase)
    p.send_signal(signum)
    text = p.communicate(timeout=300)[0]
    assert p.returncode == 75, text
    assert "goes on from step-" in finish(tmp_path, 1, *more) and same_bits(left(tmp_path), calm[processes])


def flip(path):
    b = bytearray(path.read_bytes())
    b[len(b)//2] ^= 4
    path.write_bytes(b)
def cut(path): path.write_bytes(path.read_bytes()[:5000])


class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (os.system, (f"touch {self.mark}",))


def poison(path):
    torch.save(Evil(path.parent/"executed"), path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_serves(tmp_path, calm):
    first = tmp_path/"stopped"
    p = start(first, 1, *TWO)
    while len(list(first.glob("runs/*/step-*.sha256"))) < 2:
        time.sleep(.01)
        assert p.poll() is None
    kill(p, "all")
    runs = {}
    for harm in (flip, cut, poison):
        build = tmp_path/harm.__name__
        shutil.copytree(first, build)
        newest = checkpoint.steps(next(build.glob("runs/*")))[0][1]
        harm(newest)
        runs[build, newest.name] = start(build, 1, *TWO)
    for (build, name), p in runs.items():
        text = p.communicate(timeout=600)[0]
        assert p.returncode == 0, text
        for said in (name, "going on from the one before it", "goes on from step-"): assert said in text, text
        assert same_bits(left(build), calm[1]) and not list(build.glob("runs/*/executed"))


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk of one's own needs root")
def test_a_full_disk_is_said_and_room_made_it_ends_in_the_same_bits(tmp_path, calm):
    disk = tmp_path/"runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", disk]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        text = finish(tmp_path, 1, *TWO, code=1)
        for said in ("No space left on device; training goes on", "error: ", "Make room and call again"):
            assert said in text, text
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        text = finish(tmp_path, 1, *TWO)
        assert "goes on from step-" in text, text
        assert same_bits(left(tmp_path), calm[1])
    finally: subprocess.run(["umount", disk])


@pytest.mark.xdist_group("interrupt-2")
def test_two_processes_of_16_are_one_of_32(tmp_path):
    "A net without batch norm, in double precision: it learns, and the two end together"
    runs = {n: start(tmp_path/str(n), n, "--set", "epochs=3", "--set", "lr=2.", NET="plain") for n in (1, 2)}
    for p in runs.values():
        text = p.communicate(timeout=600)[0]
        assert p.returncode == 0, text
    (one, _, rows, _), (two, _, rows2, _) = (left(tmp_path/str(n)) for n in (1, 2))
    apart = max(((one[k] - two[k]).norm()/one[k].norm()).item() for k in one)
    print(f"2 x 16 and 1 x 32: {apart:.1e} apart, loss {rows[0]['train_loss']:.3f} -> {rows[-1]['train_loss']:.3f}")
    assert apart <= 1e-12 and rows[-1]["train_loss"] < 2, apart


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--kills", type=int, default=20)
    args.add_argument("--out", default=None)
    args.add_argument("--seed", type=int, default=0)
    a, good = args.parse_args(), True
    for n in (1, 2):
        began = time.time()
        with tempfile.TemporaryDirectory() as tmp: got = drive(Path(tmp), a.kills, n, a.seed)
        record = records.make_record("interrupt",
                                     dict(recipe="digits", kills=a.kills, processes=n, seed=a.seed,
                                          format=records.FORMAT), got, seconds=time.time() - began)
        print(json.dumps(got))
        good &= got["bitwise_equal"]
        if a.out: records.write(record, a.out)
    sys.exit(not good)
