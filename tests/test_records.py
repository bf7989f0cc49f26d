"""Records that are none: copied, edited, damaged, of other formats.

Each is refused by the name of its file; none is counted, and none dropped in silence."""
import json, re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from repopt.lab import records

ROOT = Path(__file__).resolve().parents[1]
ASKED = dict(recipe=dict(name="digits", epochs=2), model="toy", mode="target", optimizer="sgd", seed=0,
             data=dict(name="digits", sha256="0", channels=1))


def made(**change):
    "A record of a training run with `change`"
    return {**records.make_record("train", ASKED, dict(top1=91., loss=.3), [dict(epoch=0, top1=50.)]), **change}


def asked(**change):
    "A record of which something else was asked, its id to match"
    return records.make_record("train", {**ASKED, **change}, dict(top1=91.))


@pytest.fixture
def folder(tmp_path):
    "A folder with one good record, and its path"
    return tmp_path, records.write(made(), tmp_path, dict(scales=np.zeros(3)))


def test_a_change_of_the_package_makes_a_record_dirty(tmp_path, monkeypatch):
    module = tmp_path/"repopt/lab/records.py"
    module.parent.mkdir(parents=True)
    module.write_text("committed = True\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]): subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(records, "__file__", str(module))
    (tmp_path/"beside").touch()
    assert not records.where()["dirty"]
    module.write_text("committed = False\n")
    assert records.where()["dirty"]


NAN, INF = float("nan"), float("inf")
WRONG = {
    "another id": made(id="0123456789"), "id of another type": made(id=7), "metrics nan": made(metrics=dict(top1=NAN)),
    "metrics inf": made(metrics=dict(loss=INF)), "metrics text": made(metrics=dict(top1="91")),
    "metrics nested nan": made(metrics=dict(q=[1., NAN])), "metrics list": made(metrics=[91.]),
    "a percentage of 9100": made(metrics=dict(top1=9100.)), "epochs nan": made(epochs=[dict(top1=NAN)]),
    "epochs text": made(epochs=[dict(top1="50")]), "epochs of numbers": made(epochs=[1, 2]),
    "epochs dict": made(epochs={}), "status in capitals": made(status="Done"), "status bool": made(status=True),
    "experiment": made(experiment="trian"), "format text": made(format="1"),
    "format true": made(format=True), "format of tomorrow": made(format=2), "asked list": made(asked=[]),
    "where text": made(where="here"), "where without hardware type": made(where=dict(hardware=3, seconds=1.)),
    "seed text": asked(seed="0"), "seed true": asked(seed=True),
    "model list": asked(model=["toy"]), "data text": asked(data="digits"), "recipe list": asked(recipe=["digits"]),
    "a list": [made()], "a number": 3, "null": None,
    **{f"no {k}": {a: b for a, b in made().items() if a != k}
       for k in ("id", "experiment", "status", "asked", "metrics", "epochs", "where", "format")}}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_record_is_refused_by_the_name_of_its_file(folder, why):
    out, good = folder
    r = WRONG[why]
    try: name = records.file_name(r)
    except Exception: name = good.name
    (good.parent/name).write_text(json.dumps(r))
    with pytest.raises(ValueError, match=re.escape(name)): records.find("train", out)


@pytest.mark.parametrize("name",
                         ["copy.json", "train-digits-copy.json", "train-cifar-{id}.json", "search-digits-{id}.json",
                          "train-digits-{id} (1).json"])
def test_a_copied_record_does_not_count_twice(folder, name):
    out, good = folder
    (good.parent/name.format(id=made()["id"])).write_text(good.read_text())
    with pytest.raises(ValueError, match="a copy counts once"): records.find("train", out)


HARM = dict(half=lambda p: p.write_text(p.read_text()[:200]), empty=lambda p: p.write_text(""),
            bytes=lambda p: p.write_bytes(b"\xff\xfe\x00"),
            twice=lambda p: p.write_text(p.read_text().replace('"id":', '"status": "failed",\n "id":', 1)),
            folder=lambda p: (p.unlink(), p.mkdir()), dangling=lambda p: (p.unlink(), p.symlink_to("nowhere.json")),
            deep=lambda p: p.write_text("["*100000))


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_is_named(folder, harm, capsys):
    out, good = folder
    HARM[harm](good)
    with pytest.raises(ValueError, match=good.name): records.load_all(out)
    assert records.main(["--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {good}") and said.count("\n") == 1, said


def test_hidden_files_of_other_systems_are_nobodys_records(folder):
    out, good = folder
    (good.parent/f"._{good.name}").write_bytes(b"\x00\x05\x16\x07")
    assert len(records.load_all(out)) == 1


def test_arrays_that_miss_or_are_damaged_are_named(folder):
    out, good = folder
    npz, r = good.with_suffix(".npz"), records.load_all(out)[0]
    assert list(records.arrays(r)) == ["scales"]
    for harm in (lambda: npz.write_bytes(npz.read_bytes()[:50]), lambda: npz.write_bytes(b""), npz.unlink):
        harm()
        with pytest.raises(ValueError, match=npz.name): records.arrays(r)


def test_nothing_wrong_is_written(tmp_path):
    for r in WRONG.values():
        with pytest.raises((ValueError, KeyError, TypeError)): records.write(r, tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_the_committed_records_are_records():
    assert all(records.arrays(r) for r in records.load_all(ROOT/"figures")
               if Path(r["path"]).with_suffix(".npz").exists())


def fail(e): raise e


ENDS = [(lambda: fail(ValueError("lr=fast")), 2, "error: lr=fast\n"),
        (lambda: open("/proc/x/y", "w"), 2, "error: /proc/x/y: No such file or directory\n"),
        (lambda: __import__("sklern"), 2, "pip install sklern\n"),
        (lambda: fail(records.BrokenOff("nan")), 1, "error: nan\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: fail(MemoryError()), 1, "error: MemoryError\n"),
        (lambda: fail(ValueError("Caught X\nTraceback (most recent call last):\n  …\nDataError: no picture")), 2,
         "error: no picture\n"),
        (lambda: records.Parser(prog="x").parse_args(["--no"]), 2, "error: unrecognized arguments: --no (see x "
                                                                   "--help)\n")]


@pytest.mark.parametrize("work,code,says", ENDS)
def test_a_command_ends_in_a_line_or_with_its_work_done(work, code, says, capsys):
    assert records.command_line(lambda argv: work())([]) == code
    err = capsys.readouterr().err
    assert err.endswith(says) and err.count("\n") == 1, err


def test_a_reader_that_goes_ends_nothing(tmp_path):
    done = tmp_path/"done"
    work = f"[print('line', i, flush=True) for i in range(20000)] and open({str(done)!r}, 'w') and 0"
    code = f"import sys; from repopt.lab.records import command_line; sys.exit(command_line(lambda argv: {work})())"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    p.stdout.close()
    assert not p.stderr.read() and p.wait(timeout=60) == 0 and done.exists()
