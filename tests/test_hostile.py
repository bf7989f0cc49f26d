"""Input that no program wants: every kind of `tests/hostile.py` is a test, which lists the cases that were
not handled.

The kinds are played in a few processes, as `python tests/hostile.py -k KIND -k KIND` does: what they import, and the
runs that they begin with, are made once. Never in this process: the cases are forks, and a process that has compiled or
started threads, as one that ran other tests has, is no safe thing to fork. The kinds in hostile.SLOW take minutes:
`make test-slow` plays them. Fast, in the kind "environment": of "compiler" a net of one layer, and a cache that cannot
be written; of "interpreter" records to a closed pipe and to a full device.
"""
import re
import subprocess
import sys
from functools import cache

import pytest

import hostile

FIRST = ("recipe", "--set", "checkpoint", "environment", "pictures", "record", "plan")
KINDS = list(dict.fromkeys(name for name, _ in hostile.KINDS))
PARTS = [[k for k in KINDS if k in FIRST], [k for k in KINDS if k not in (*FIRST, *hostile.SLOW)], [*hostile.SLOW]]


@cache
def played(part):
    "What the kinds of a part gave"
    words = [f"-k={kind}" for kind in PARTS[part]]
    return subprocess.run([sys.executable, hostile.__file__, *words], capture_output=True, text=True)


def marks(part, kind):
    return [pytest.mark.xdist_group(f"hostile-{part}")] + [pytest.mark.slow]*(kind in hostile.SLOW)


@pytest.mark.parametrize("part,kind", [pytest.param(i, kind, id=kind, marks=marks(i, kind))
                                       for i, kinds in enumerate(PARTS) for kind in kinds])
def test_hostile_input_is_refused_in_words_or_the_work_is_done(part, kind):
    r = played(part)
    wrong = [line for line in r.stdout.splitlines() if f": {kind}: " in line]
    all_of_them = re.search(rf"^{re.escape(f'{kind:20}')} +([1-9]\d*)  \1 handled$", r.stdout, re.M)
    assert all_of_them and not wrong, "\n".join(wrong) or r.stdout[-1000:] + r.stderr[-2000:]
