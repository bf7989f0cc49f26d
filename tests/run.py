"""`make test`: every notebook as nbdev tests it, then pytest on tests/; closes with 'N passed, N failed' counted from
what ran. `--slow`: the cells under `#| slow`, with the pages that they stand in, and the tests marked `slow`.

Every notebook must be seen to complete; nbdev_test, which this stands for, exits 0 where it found nothing to test. What
takes longest begins first, so that no worker is left alone with it. What was slowest is said before the last line,
notebooks and tests together.
"""
import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = r"(\d.*|[a-z]_.*|index)\.ipynb"  # not what papermill was told to write there
LONGEST = ("05a_speed g_runs 06_quantization 07_paper m_claims h_2_memory l_evidence d_distributed 02a_repghost "
           "02_models h_plan 01f_optim 01c_engine 04_hyper_search").split()


def project_notebooks():
    "The notebooks in nbs/ that are the project's"
    return sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if re.fullmatch(NOTEBOOK, p.name)
                  and ".ipynb_checkpoints" not in p.parts)


def longest_first(books):
    return sorted(books, key=lambda p: LONGEST.index(p.stem) if p.stem in LONGEST else len(LONGEST))


def slow_notebooks():
    "Those with cells that `make test` leaves out"
    return [p for p in project_notebooks() if re.search(r'"#\| ?slow\\n', p.read_text())]


def stream(*command):
    "Run `command`, pass its output through as it comes, and give back (return code, output)."
    p = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    lines = []
    for line in p.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return p.wait(), "".join(lines)


# nbdev_test itself, but for the order, which there is that of the names
PLAY = """import sys
from pathlib import Path
from fastcore.parallel import parallel
from nbdev.config import get_config
from nbdev.test import test_nb
jobs, force, *books = sys.argv[1:]
how = dict(skip_flags=get_config().tst_flags.split(), force_flags=force.split(), basepath=get_config().config_path)
done = parallel(test_nb, [*map(Path, books)], n_workers=int(jobs), pause=.01, do_print=True, **how)
for book, (passed, seconds) in zip(books, done):
    print("passed" if passed else "FAILED", f"{seconds:.0f} s", Path(book).name)
sys.exit(not all(passed for passed, _ in done))"""


def notebooks(jobs, books=None, force=""):
    """(passed, failed, {name: seconds}) of every notebook in nbs/, or of `books`.

    `force`: flags of cells that are run too."""
    books = project_notebooks() if books is None else books
    if not books: return 0, 0, {}
    rc, out = stream(sys.executable, "-c", PLAY, jobs, force, *longest_first(books))
    said = re.findall(r"^(passed|FAILED) (\d+) s (\S+\.ipynb)$", out, re.M)
    passed = {name for how, _, name in said if how == "passed"} & {p.name for p in books}
    failed = {p.name for p in books} - passed
    if missing := failed - {name for *_, name in said}: print("never completed:", *sorted(missing))
    if rc and not failed: failed = {"nbdev itself"}
    return len(passed), len(failed), {name: float(seconds) for _, seconds, name in said}


def pytests(jobs, slow=False):
    """(passed, failed, {name: seconds}) of pytest over tests/.

    What stays together, in which order, says tests/conftest.py."""
    how = ["-q", "-n", jobs, "--dist", "loadgroup", "--no-loadscope-reorder", "--durations", "12",
           "-m", "slow" if slow else "not slow"]
    rc, out = stream(sys.executable, "-m", "pytest", *how, *sorted((ROOT/"tests").glob("test_*.py")))
    count = lambda word: sum(map(int, re.findall(rf"(\d+) {word}", out.strip().splitlines()[-1])))
    passed, failed = count("passed"), count("failed") + count("error")
    said = re.findall(r"^([\d.]+)s (?:call|setup) +(\S+::[^@\n]*)", out, re.M)
    times = {name: float(seconds) for seconds, name in said}
    return passed, failed + (rc != 0 and failed == 0), times


if __name__ == "__main__":
    # notebooks share their short runs; nothing is found from before
    os.environ["REPOPT_BUILD"] = tempfile.mkdtemp(prefix="repopt-test-")
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--jobs", type=int, default=2, help="notebooks, and then groups of tests, at a time")
    args.add_argument("--slow", action="store_true", help="what takes minutes, which `make test` leaves out")
    asked, start = args.parse_args(), time.time()
    pages = notebooks(asked.jobs, slow_notebooks(), "slow") if asked.slow else notebooks(asked.jobs)
    (*books, slow), (*tests, slower) = pages, pytests(asked.jobs, asked.slow)
    passed, failed = map(sum, zip(books, tests))
    slowest = sorted((slow | slower).items(), key=lambda x: -x[1])[:12]
    print("slowest:", *(f"{seconds:6.0f} s  {name}" for name, seconds in slowest), sep="\n")
    print(f"{time.time() - start:.0f} s\n{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)
