"""Hostile input of every kind, as `python tests/hostile.py` plays it: handled, or named here"""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_hostile_input_is_handled():
    r = subprocess.run([sys.executable, ROOT/"tests"/"hostile.py"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.strip().endswith("0 tracebacks, 0 silent acceptances")
