"""Input that no program wants: every kind of `tests/hostile.py` is a test, which lists the cases that were not handled."""
import pytest

from hostile import KINDS, cases, play


@pytest.mark.parametrize("kind", dict.fromkeys(name for name, _ in KINDS))
def test_hostile_input_is_refused_in_words_or_the_work_done(kind):
    played = play(cases(kind))
    wrong = [f"{verdict}: {case.what}: {seen}" for case, verdict, seen in played if verdict != "handled"]
    assert played and not wrong, f"{len(wrong)} of {len(played)} cases\n" + "\n".join(wrong)
