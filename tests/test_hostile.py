"""Input that no program wants: every kind of `tests/hostile.py` is a test, which lists the cases that were
not handled.

Each kind is played by a process of its own, as `python tests/hostile.py -k KIND` does: its cases are forks, and a
process that has compiled or started threads, as one that ran other tests has, is no safe thing to fork. The kinds in
SLOW take minutes: `make test-slow` plays them.
"""
import subprocess
import sys

import pytest

import hostile


@pytest.mark.parametrize("kind", dict.fromkeys(name for name, _ in hostile.KINDS if name not in hostile.SLOW))
def test_hostile_input_is_refused_in_words_or_the_work_is_done(kind):
    r = subprocess.run([sys.executable, hostile.__file__, f"-k={kind}"], capture_output=True, text=True)
    assert r.returncode == 0 and "0 tracebacks, 0 silent acceptances" in r.stdout, r.stdout + r.stderr[-2000:]
