"""`make test`: nbdev_test on every notebook, then pytest on tests/; closes with 'N passed, N failed' counted from what
ran.

nbdev_test prints only 'Success.', and exits 0 where it found nothing to test; here every notebook must be seen to
complete. What was slowest is said before the last line, notebooks and tests together.
"""
import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOK = r"(\d.*|[a-z]_.*|index)\.ipynb"  # not what papermill was told to write there


def project_notebooks():
    "The notebooks in nbs/ that are the project's"
    return sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if re.fullmatch(NOTEBOOK, p.name)
                  and ".ipynb_checkpoints" not in p.parts)


def stream(*command):
    "Run `command`, pass its output through as it comes, and give back (return code, output)."
    p = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    lines = []
    for line in p.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return p.wait(), "".join(lines)


def notebooks(jobs):
    "(passed, failed, {name: seconds}) of `nbdev_test` over every notebook in nbs/"
    want = {p.name for p in project_notebooks()}
    how = ["--do_print", "--timing", "--n_workers", jobs, "--file_re", f"^{NOTEBOOK}$"]
    rc, out = stream(sys.executable, BIN/"nbdev_test", *how)
    done = {Path(m).name for m in re.findall(r"^- Completed (.+\.ipynb)$", out, re.M)}
    failed = set(re.findall(r"^\t(\S+\.ipynb)$", out, re.M))
    missing = want - done - failed
    if missing: print("never completed:", *sorted(missing))
    failed |= missing
    if rc and not failed: failed = {"nbdev_test itself"}
    times = {name: float(seconds) for name, seconds in re.findall(r"^(\S+\.ipynb): (\d+) secs$", out, re.M)}
    return len(want - failed), len(failed), times


def pytests(jobs):
    "(passed, failed, {name: seconds}) of pytest over tests/, whole files at a time; Slurm's, the longest, first"
    files = sorted((ROOT/"tests").glob("test_*.py"), key=lambda p: p.stem != "test_slurm")
    how = ["-q", "-n", jobs, "--dist", "loadfile", "--no-loadscope-reorder", "--durations", "12"]
    rc, out = stream(sys.executable, "-m", "pytest", *how, *files)
    count = lambda word: sum(map(int, re.findall(rf"(\d+) {word}", out.strip().splitlines()[-1])))
    passed, failed = count("passed"), count("failed") + count("error")
    times = {name: float(seconds) for seconds, name in re.findall(r"^([\d.]+)s call +(\S+::\S.*)$", out, re.M)}
    return passed, failed + (rc != 0 and failed == 0), times


if __name__ == "__main__":
    # notebooks share their short runs; nothing is found from before
    os.environ["REPOPT_BUILD"] = tempfile.mkdtemp(prefix="repopt-test-")
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--jobs", type=int, default=2, help="notebooks, and then files of tests/, at a time")
    jobs, start = args.parse_args().jobs, time.time()
    (*books, slow), (*tests, slower) = notebooks(jobs), pytests(jobs)
    passed, failed = map(sum, zip(books, tests))
    slowest = sorted((slow | slower).items(), key=lambda x: -x[1])[:12]
    print("slowest:", *(f"{seconds:6.0f} s  {name}" for name, seconds in slowest), sep="\n")
    print(f"{time.time() - start:.0f} s\n{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)
