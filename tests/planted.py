"""Faults as one makes them, planted in a copy of the package one after the other: each must be caught by what `make
test` runs.

    make planted                              all of them; a table: fault, caught by, seconds
    python tests/planted.py sign resume       those whose name holds one of the words

A fault is one small change of text, which must stand in the package once: where it stands no longer, that is an error
of this script, and said so. Each is planted in a process of its own, forked from this one, which has imported what the
tests import and nothing of the package; the tests and pages named beside it run until the first fails. That they pass
without a fault is `make test`'s to say. Ends with 'N of N caught'; exit code 1 where one was not, or could not be
planted.
"""
import argparse, os, shutil, sys, tempfile, time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BEFORE = ("torch torch.nn torch.distributed torchvision timm numpy hypothesis pytest pandas matplotlib.pyplot psutil "
          "fastcore.test fastcore.parallel nbdev.test execnb.shell").split()


class Fault(NamedTuple):
    name: str
    text: str               # in one place of the package
    becomes: str
    caught_by: str          # tests of tests/ and pages of nbs/ that are to see it, the fastest first


FAULTS = [
    # the Grad Mult
    Fault("the mask of the centre is dropped", "if len(columns) == L: return None", "return None",
          "test_optim.py::test_the_grad_mult_written_out"),
    Fault("the identity is missing in the Grad Mult", 'torch.ones_like(s) if n == "identity"',
          'torch.zeros_like(s) if n == "identity"', "test_optim.py::test_the_grad_mult_written_out"),
    Fault("an identity's constant is what its search ended with", 'torch.ones_like(s) if n == "identity" else s', "s",
          "test_optim.py::test_the_grad_mult_written_out"),
    Fault("a scale below zero keeps its sign", "a.abs()[rows]", "a[rows]",
          "test_optim.py::test_the_grad_mult_written_out"),
    Fault("scales are averaged over channels", "a.abs()[rows]", "a.abs().mean().expand_as(a)[rows]",
          "test_optim.py::test_the_grad_mult_written_out"),
    Fault("|α| for α² in the Grad Mult", "n: a.abs()**(degree + 1)", "n: a.abs()**degree",
          "test_clients.py::test_the_clipped_norm_is_that_of_the_branches"),
    # the step
    Fault("the sign of maximize", "G = [-g for g in G]", "G = [+g for g in G]",
          "test_clients.py::test_every_input_of_torchs_lists"),
    Fault("Nesterov's look ahead is left out", 'k["momentum"]*buf if nesterov else buf', 'k["momentum"]*buf',
          "test_optim.py::test_golden_trajectory test_clients.py::test_every_input_of_torchs_lists"),
    Fault("momentum is not restored: the view of the state before is stepped on",
          "state.get(n) is self.state.get(n, p)", "n in state",
          "test_trust_optim.py::test_state_is_joined_by_name_whatever_the_order"),
    Fault("a stale place: a kernel that moved in memory is stepped where it was", "self.at == local_rows(p).data_ptr()",
          "self.at", "test_trust_optim.py::test_kernels_in_any_dense_layout test_trust_optim.py"),
    Fault("a stale cache: the Grad Mult of another precision", "key = name, p.device, p.dtype, degree",
          "key = name, degree", "test_clients.py::test_the_clipped_norm_is_that_of_the_branches test_trust_optim.py"),
    Fault("decay is applied to scales", "norm or n == \"bias\" or (p.ndim < 2 and not branch)", 'norm or n == "bias"',
          "test_trust_optim.py::test_groups_decay_kernels_alone_once_and_keep_frozen_ones"),
    Fault("decay where no branch is", "torch.where(v.held, w, v.whole)", "v.whole",
          "test_trust_optim.py::test_no_decay_takes_from_entries_that_no_branch_moves"),
    Fault("the norm that is clipped is torch's", "m is None else m.norm2(g)", "m is m else m.norm2(g)",
          "test_clients.py::test_the_clipped_norm_is_that_of_the_branches"),
    # nets and files
    Fault("kernels begin without their scales", "_put(W, equivalent_kernel(maps, scales,",
          "_put(W, equivalent_kernel(maps, {n: torch.ones_like(s) for n, s in scales.items()},", "01a_scales.ipynb"),
    Fault("the names of two branches are swapped in the authors' files",
          '"scale_conv": "conv", "scale_1x1": "conv_1x1"',
          '"scale_conv": "conv_1x1", "scale_1x1": "conv"', "01a_scales.ipynb 01_published.ipynb"),
    Fault("eps is lost where a batch norm is fused", "bn.running_var, bn.eps,", "bn.running_var, 0.,",
          "test_published.py::test_timms_repvgg_goes_in_and_computes_the_same 02_models.ipynb"),
    # the laboratory
    Fault("label smoothing is off", "label_smoothing=recipe.label_smoothing", "label_smoothing=0.",
          "lab/f_training.ipynb"),
    Fault("the parts of a batch are added, not averaged", "label_smoothing=recipe.label_smoothing)/recipe.accumulate",
          "label_smoothing=recipe.label_smoothing)",
          "test_training.py::test_a_batch_in_parts_takes_the_step_of_the_whole"),
    Fault("the average of the weights forgets what it should keep", "(to, of, 1 - decay)", "(to, of, decay)",
          "lab/f_training.ipynb"),
    Fault("the same order of pictures in every epoch", "generator=generator(self.seed, epoch))",
          "generator=generator(self.seed))", "lab/b_4_batches.ipynb"),
    Fault("the seed of a run does not reach the order of its pictures", "generator=generator(self.seed, epoch))",
          "generator=generator(epoch))", "lab/b_4_batches.ipynb"),
    Fault("the last batch of a test is lost", "-(-self.n//self.batch_size)", "self.n//self.batch_size",
          "lab/b_4_batches.ipynb"),
    Fault("the optimizer's state is lost on resume", 'm.opt.load_state_dict(kept["optimizer"])', "pass",
          "lab/f_1_loop.ipynb"),
    Fault("a step is made twice on resume", "if due: save(m, epoch, i + 1, loss)", "if due: save(m, epoch, i, loss)",
          "lab/f_1_loop.ipynb"),
    Fault("a damaged checkpoint is taken", "whole = mark.exists() and", "whole = mark.exists() or",
          "lab/c_checkpoint.ipynb"),
    Fault("the warm-up is a step late", "peak*(step + 1)/(warm + 1)", "peak*step/(warm + 1)", "lab/e_recipes.ipynb"),
    Fault("runs of all seeds have one id", "json.dumps(asked, sort_keys=True, default=str)",
          "json.dumps({**asked, 'seed': 0}, sort_keys=True, default=str)",
          "test_training.py::test_keys_that_came_later_do_not_change_the_ids_of_older_runs"),
    Fault("the spread over seeds is that of all seeds there are", "float(v.std(ddof=1)) if len(v) > 1",
          "float(v.std()) if len(v) > 1", "lab/a_records.ipynb"),
]


class NotPlanted(Exception): "The text of a fault is not in the package once, or what is left is no package any more"


def planted(fault, home):
    "Change the one place in the package in `home`"
    at = [p for p in (home/"repopt").rglob("*.py") if fault.text in p.read_text()]
    there = sum(p.read_text().count(fault.text) for p in at)
    if there != 1: raise NotPlanted(f"{fault.text!r} stands {there} times in the package: correct tests/planted.py")
    at[0].write_text(at[0].read_text().replace(fault.text, fault.becomes))
    compile(at[0].read_text(), at[0], "exec")


class First:
    "What failed first"
    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed: self.name = self.name or report.nodeid.rpartition("/")[2]

    def pytest_collectreport(self, report):
        if report.failed: raise NotPlanted(f"{report.nodeid} cannot be imported:\n{report.longreprtext[-800:]}")


def seen_by(where, home) -> str:
    "What of the test or page `where` fails in `home`, or ''"
    if where.endswith(".ipynb"):
        from nbdev.test import test_nb
        return "" if test_nb(home/"nbs"/where, skip_flags=["gpu", "slow"], basepath=home)[0] else where
    import pytest
    first = First()
    code = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"tests/{where}"], plugins=[first])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise NotPlanted(f"pytest ends with {code!r} on {where}: correct tests/planted.py")
    return first.name


def look(fault, home, answer):
    "In a process of its own: leave what caught the fault in the file `answer`"
    os.chdir(home)
    sys.path.insert(0, str(home))
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    for n in (1, 2): os.dup2(log, n)
    os.environ.update(PYTHONPATH=str(home), REPOPT_BUILD=str(home/"build"), IN_TEST="1", MPLBACKEND="agg")
    try:
        planted(fault, home)
        answer.write_text(next((name for w in fault.caught_by.split() if (name := seen_by(w, home))), ""))
    except (NotPlanted, SyntaxError) as e: answer.with_suffix(".error").write_text(str(e))
    except BaseException as e:                 # the process is not to go on into the parent's code
        answer.with_suffix(".error").write_text(f"{type(e).__name__}: {e}")


def play(fault, folder) -> tuple:
    "(what caught it or '', what was wrong or '', seconds)"
    began, home, answer = time.time(), folder/"copy", folder/"answer.txt"
    for p in folder.glob("*"): shutil.rmtree(p) if p.is_dir() else p.unlink()
    leave = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, home, ignore=leave)
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try: look(fault, home, answer)
        finally: os._exit(0)
    os.waitpid(pid, 0)
    wrong = answer.with_suffix(".error")
    error = wrong.read_text() if wrong.exists() else "" if answer.exists() else "its process ended early"
    return answer.read_text() if answer.exists() else "", error, time.time() - began


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("words", nargs="*", help="words of the faults' names; none: all")
    words, caught = args.parse_args().words, 0
    faults = [f for f in FAULTS if not words or any(w in f.name for w in words)]
    for name in BEFORE: import_module(name)
    assert "repopt" not in sys.modules
    print("| fault | caught by | s |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        for f in faults:
            by, error, seconds = play(f, Path(folder))
            caught += bool(by)
            print(f"| {f.name} | {by or error or 'NOTHING'} | {seconds:.0f} |", flush=True)
    print(f"{caught} of {len(faults)} caught")
    return 0 if faults and caught == len(faults) else 1


if __name__ == "__main__": sys.exit(main())
