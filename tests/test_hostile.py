"""Input that no program wants: every kind of `tests/hostile.py` is a test, which lists the cases that were not handled.

The kinds in SLOW take minutes: `make test-slow` plays them.
"""
import pytest

from hostile import KINDS, SLOW, cases, play


@pytest.mark.parametrize("kind", dict.fromkeys(name for name, _ in KINDS if name not in SLOW))
def test_hostile_input_is_refused_in_words_or_the_work_is_done(kind):
    played = play(cases(kind))
    wrong = [f"{verdict}: {case.what}: {seen}" for case, verdict, seen in played if verdict != "handled"]
    assert played and not wrong, f"{len(wrong)} of {len(played)} cases\n" + "\n".join(wrong)
