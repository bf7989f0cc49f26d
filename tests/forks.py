"""Several Python programs for the price of one start: a process that has imported torch forks one child for each.

A child has imported nothing of the package, and its own arguments, folder and output.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

PARENT = """import json, os, sys, traceback, torch
def be(code, words, folder, log):
    os.chdir(folder)
    for n, name in enumerate(("/dev/null", log + ".out", log + ".err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), n)
    sys.argv[:] = ["-c", *words]
    try: exec(compile(code, "<program>", "exec"), dict(__name__="__main__"))
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
for program in json.load(sys.stdin):
    if (pid := os.fork()) == 0:
        status = 1
        try: status = be(*program)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)"""
# python -m WORDS
MODULE = """import runpy, sys
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""


def each(programs, **env) -> list:
    """What became of (code, words, folder) of each: `returncode`, `stdout`, `stderr`, as subprocess.run has them.

    `env`: beside this process's environment, for all."""
    with tempfile.TemporaryDirectory() as logs:
        asked = [(code, [*map(str, words)], str(folder), f"{logs}/{i}") for i, (code, words, folder) in
                 enumerate(programs)]
        r = subprocess.run([sys.executable, "-c", PARENT], input=json.dumps(asked), env={**os.environ, **env},
                           text=True, capture_output=True)
        if r.returncode: raise RuntimeError(r.stderr)
        return [SimpleNamespace(returncode=int(code), stdout=Path(f"{log}.out").read_text(),
                                stderr=Path(f"{log}.err").read_text())
                for code, (*_, log) in zip(r.stdout.split(), asked, strict=True)]
