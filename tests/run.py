"""`make test`: nbdev_test on every notebook, then pytest on tests/; closes with 'N passed, N failed' counted from what ran.

nbdev_test prints only 'Success.', and exits 0 where it found nothing to test; here every notebook must be seen to complete.
"""
import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def stream(*command):
    "Run `command`, pass its output through as it comes, and give back (return code, output)."
    p = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in p.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return p.wait(), "".join(lines)


def notebooks(jobs):
    "(passed, failed) of `nbdev_test` over every notebook in nbs/"
    want = {p.name for p in (ROOT/"nbs").glob("*.ipynb") if not p.name.startswith("_")}
    rc, out = stream(BIN/"nbdev_test", "--do_print", "--timing", "--n_workers", jobs)
    done = {Path(m).name for m in re.findall(r"^- Completed (.+\.ipynb)$", out, re.M)}
    failed = set(re.findall(r"^\t(\S+\.ipynb)$", out, re.M))
    missing = want - done - failed
    if missing: print("never completed:", *sorted(missing))
    failed |= missing
    if rc and not failed: failed = {"nbdev_test itself"}
    return len(want - failed), len(failed)


def pytests(jobs):
    "(passed, failed) of pytest over tests/, whole files at a time; Slurm's, the longest, first"
    files = sorted((ROOT/"tests").glob("test_*.py"), key=lambda p: p.stem != "test_slurm")
    rc, out = stream(sys.executable, "-m", "pytest", "-q", "-n", jobs, "--dist", "loadfile", "--no-loadscope-reorder", "--durations", "12", *files)
    count = lambda word: sum(map(int, re.findall(rf"(\d+) {word}", out.strip().splitlines()[-1])))
    passed, failed = count("passed"), count("failed") + count("error")
    return passed, failed + (rc != 0 and failed == 0)


if __name__ == "__main__":
    os.environ["REPOPT_BUILD"] = tempfile.mkdtemp(prefix="repopt-test-")     # notebooks share their short runs; nothing is found from before
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--jobs", type=int, default=2, help="notebooks, and then files of tests/, at a time")
    jobs, start = args.parse_args().jobs, time.time()
    counts = [notebooks(jobs), pytests(jobs)]
    passed, failed = map(sum, zip(*counts))
    print(f"{time.time() - start:.0f} s\n{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)
