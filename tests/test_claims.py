"""The ledger, computed a second time from the files alone: nothing of repopt is imported here.

Means, intervals and verdicts of every claim that compares two arms of the protocol, and the committed ledger itself."""
import csv, json, math, statistics
from collections import defaultdict
from pathlib import Path

import yaml
from scipy.stats import t

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = yaml.safe_load((ROOT/"repopt/assets/protocol.yaml").read_text())["fashion"]
CLAIMS = yaml.safe_load((ROOT/"repopt/assets/claims.yaml").read_text())["claims"]
LEDGER = {row["id"]: row for row in reversed(list(csv.DictReader((ROOT/"figures/claims.csv").open())))}
RECORDS = [json.loads(p.read_text()) for p in sorted((ROOT/"figures/runs").glob("*.json"))]
CELLS = [(r["where"]["cell"], r["metrics"]) for r in RECORDS if "cell" in r["where"] and r["status"] == "done"]
ARMS = [c for c in CLAIMS if c["rule"] in ("difference", "equality") and isinstance(c.get("of"), (str, list))]


def chosen(arm):
    "(top-1 on the choosing pictures, lr, decay) of the best rate with all three seeds"
    tops = defaultdict(list)
    for c, m in CELLS:
        if (c["part"], c["arm"]) == ("choose", arm): tops[c["lr"], c["weight_decay"]].append(m["top1"])
    return max(((statistics.fmean(v), *at) for at, v in tops.items() if len(v) == 3), default=None)


def side(claim, arms):
    "{seed: the claim's metric, of several arms their mean} of what counts"
    found = []
    for arm in [arms] if isinstance(arms, str) else arms:
        part = claim.get("part", "count")
        at = (None, None) if part == "search" else (chosen(PROTOCOL["arms"][arm].get("at", arm)) or (None,))[1:]
        name = claim.get("metric", "top1")
        found.append({c["seed"]: m[name] for c, m in CELLS if at and c["seed"] in PROTOCOL["seeds"]
                      and (c["part"], c["arm"], c["lr"], c["weight_decay"]) == (part, arm, *at)})
    return {s: statistics.fmean(f[s] for f in found) for s in set.intersection(*map(set, found))}


def differences(claim):
    a = side(claim, claim["of"])
    b = side(claim, claim["over"]) if claim["over"] else dict.fromkeys(a, 0)
    return [a[s] - b[s] for s in sorted(a.keys() & b.keys())]


def interval(v, level=.95):
    half = t.ppf(.5 + level/2, len(v) - 1)*statistics.stdev(v)/math.sqrt(len(v))
    return statistics.fmean(v) - half, statistics.fmean(v) + half


def moved(claim):
    arms = [a for k in ("of", "over") for a in ([claim[k]] if isinstance(claim[k], str) else claim[k] or [])]
    names = {PROTOCOL["arms"].get(a, {}).get("scales") for a in arms} - {None, "ones", "sqrt2l"}
    far = [m for c, m in CELLS if c["part"] == "search" and c["arm"] in names]
    return not far or all(statistics.fmean(m[k] for m in far) >= least for k, least in PROTOCOL["moved"].items())


def verdict(claim, half):
    v, margin = differences(claim), claim.get("margin", half)
    if len(v) < len(PROTOCOL["seeds"]) or not moved(claim): return "undecided"
    if claim["rule"] == "difference":
        low, high = interval(v)
        return "supported" if low > 0 else "not supported" if high < .25 else "undecided"
    low, high = interval(v, .9)
    apart = [d for c in ARMS if c["rule"] == "difference" and "part" not in c and verdict(c, half) == "supported"
             for d in [statistics.fmean(differences(c))] if d >= 2*half]
    if "margin" not in claim and (not apart or margin <= 0): return "undecided"
    return "supported" if -margin < low and high < margin else "not supported" if low > margin or high < -margin else \
           "undecided"


def test_the_ledger_says_what_the_records_say():
    margin = (chosen("repvgg")[0] - chosen("plain")[0])/2
    compared = 0
    for claim in ARMS:
        row, v = LEDGER[claim["id"]], differences(claim)
        if len(v) < 2:
            assert row["verdict"] == "not run" or not row["setting"].startswith("smaller: Fashion"), claim["id"]
            continue
        low, high = interval(v, .9 if claim["rule"] == "equality" else .95)
        assert row["verdict"] == verdict(claim, margin), claim["id"]
        if row["ours"]:
            found = [float(row[k]) for k in ("ours", "low", "high")]
            assert all(abs(a - b) < 6e-5 for a, b in zip(found, (statistics.fmean(v), low, high))), (claim["id"], found)
            assert int(row["n"]) == len(v)
            compared += 1
    assert compared >= 5


def test_there_are_no_claims_but_those_of_the_file():
    assert [c["id"] for c in CLAIMS] == list(dict.fromkeys(r["id"] for r in csv.DictReader(
        (ROOT/"figures/claims.csv").open()))) and len(CLAIMS) >= 30


def test_readme_says_what_the_ledger_says():
    first = (ROOT/"figures/claims.md").read_text().splitlines()[0]
    assert first.startswith(f"Of {len(CLAIMS)} claims ") and first in (ROOT/"README.md").read_text()
    words = [LEDGER[c["id"]]["verdict"] for c in CLAIMS]
    for word in set(words): assert f"{words.count(word)} {word}" in first
