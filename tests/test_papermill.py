"""The notebooks as papermill runs them: a misspelt parameter stops at once, and a notebook killed half way goes on."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def papermill(notebook, out, build, *parameters):
    """papermill as a user starts it: a kernel that finds pytest in its environment leaves what its workers print out of
    the notebook."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}, "REPOPT_BUILD": str(build),
           "OMP_NUM_THREADS": "1"}
    args = [x for k, v in zip(parameters[::2], parameters[1::2]) for x in ("-p", k, v)]
    return subprocess.Popen([sys.executable, "-m", "papermill", ROOT/"nbs"/notebook, out, "--cwd", ROOT/"nbs",
                             "--no-progress-bar", *args],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def test_unknown_parameter(tmp_path):
    p = papermill("04_hyper_search.ipynb", tmp_path/"out.ipynb", tmp_path, "recipie", "cifar")
    text = p.communicate(timeout=300)[0]
    assert p.returncode and "unknown notebook parameter 'recipie', did you mean 'recipe'?" in text


def test_missing_data(tmp_path):
    p = papermill("04_hyper_search.ipynb", tmp_path/"out.ipynb", tmp_path, "recipe", "cifar", "data", str(tmp_path))
    text = p.communicate(timeout=300)[0]
    assert p.returncode and "holds no intact CIFAR-100" in text


def test_killed_half_way_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("REPOPT_SAVE_SECONDS", "0.3")
    build, records = tmp_path/"build", tmp_path/"figures"
    asked = ("epochs", "3", "seeds", "2", "arms", "searched", "out", str(records))  # two searches at a time, in workers
    p = papermill("05_train_imagenet.ipynb", tmp_path/"out.ipynb", build, *asked)
    deadline = time.time() + 120
    while not list(build.glob("runs/*/step-*.sha256")) and time.time() < deadline: time.sleep(.02)
    # papermill, its kernel and the workers
    for q in [*psutil.Process(p.pid).children(recursive=True), p]: q.send_signal(signal.SIGKILL)
    p.wait(60)
    assert not list(records.glob("runs/*.json")) and list(build.glob("runs/*/step-*.pt"))
    p = papermill("05_train_imagenet.ipynb", tmp_path/"out.ipynb", build, *asked)
    text = p.communicate(timeout=600)[0]
    assert p.returncode == 0, text
    found = [json.loads(f.read_text()) for kind in ("search", "train")
             for f in records.glob(f"runs/{kind}-digits-*.json")]
    assert [(r["experiment"], len(r["epochs"]), r["status"])
            for r in found] == [("search", 3, "done")]*2 + [("train", 3, "done")]*2
    assert "goes on from step-" in (tmp_path/"out.ipynb").read_text()


def test_the_graph_for_imagenet_searches_on_cifar():
    """A dry run of the graph: the net that ImageNet is to train is searched by the recipe that 05 and 06 take its
    scales from."""
    said = subprocess.run([sys.executable, "-m", "snakemake", "--profile", "profiles/local", "-n", "-p", "--config",
                           "recipe=imagenet", "data=/data"], cwd=ROOT, capture_output=True, text=True)
    lines = [dict(re.findall(r"-p (recipe|model|search) (\S+)", l)) for l in (said.stdout + said.stderr).splitlines()
             if "papermill nbs/" in l and "-p recipe" in l]
    assert lines == [dict(recipe="cifar", model="repoptvgg_b1"), *[dict(recipe="imagenet", search="cifar")]*2,
                     dict(recipe="imagenet")], said.stdout + said.stderr
