"""The GPU's side of `python -m repopt speed`, with a stand-in for the card: what is asked, searched for, written and
said when memory or time run out."""
import json
from types import SimpleNamespace

import pytest
import torch

from repopt.lab import memory, plan, speed, timing
from repopt.optim import RepNAdam, rep_optimizer
from repopt.lab.training import OPTIMIZERS, build_model, make_optimizer
from repopt.lab.recipes import Recipe


@pytest.fixture
def card(monkeypatch):
    """torch.cuda as far as the module asks it, with a card on which a batch of more than 5 is out of memory.

    Tensors and clocks are the CPU's."""
    cuda = dict(get_device_properties=lambda i=0: SimpleNamespace(total_memory=2**24),
                set_per_process_memory_fraction=lambda f: asked.append(f), reset_peak_memory_stats=lambda: None,
                synchronize=lambda: None, empty_cache=lambda: None, memory_allocated=lambda: 0,
                max_memory_allocated=lambda: 7, max_memory_reserved=lambda: 8, memory_reserved=lambda: 0,
                mem_get_info=lambda: (2**30, 2**33))
    for k, v in cuda.items(): monkeypatch.setattr(torch.cuda, k, v)
    asked, opened, step = [], timing.Work.open, timing.Work.__call__
    def on_cpu(self):
        self.device = "cpu"
        return opened(self)
    def small(self):
        if self.train and self.batch > 5: raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)
    for module in (timing, memory, speed): monkeypatch.setattr(module, "accelerator", lambda: "cuda")
    monkeypatch.setattr(speed, "ceilings", lambda *a: dict(fp32=1e9, tf32=2e9, bf16=3e9, copy=1e9))
    monkeypatch.setattr(speed, "TABLE3", {"repoptvgg_digits": (32, 2)})
    monkeypatch.setattr(timing.Work, "open", on_cpu)
    monkeypatch.setattr(timing.Work, "__call__", small)
    return asked


def test_rows_of_a_gpu(card, tmp_path, capsys):
    argv = ("--train digits --infer table3 --size 32 --batch 2,max --precision fp32 --compiled= --memory-cap .01 "
            "--rounds 2 --minutes 60")
    assert speed.main([*argv.split(), "--out", str(tmp_path)]) == 0
    found = [json.loads(p.read_text()) for p in (tmp_path/"runs").glob("*.json")]
    batches = {(r["asked"]["model"], r["asked"]["cap"]): r["metrics"] for r in found if r["experiment"] == "max_batch"}
    assert {k: m["max_batch"] for k, m in batches.items()} == {(f"{f}_digits", cap): 5 for f in ("repvgg", "repoptvgg")
                                                               for cap in (.01, None)}
    assert all((m["allocated"], m["reserved"]) == (7, 8) for m in batches.values()) and 1. in card and min(card) < 1
    timed = {(r["asked"]["model"], str(r["asked"]["batch"]), r["asked"].get("cap")): r["metrics"]["images"]
             for r in found if r["experiment"] == "train_speed"}
    assert timed == {(f"{f}_digits", b, c): n for f in ("repvgg", "repoptvgg")
                     for b, c, n in (("2", None, 2), ("max", .01, 5), ("max", None, 5))}
    assert sum(r["experiment"] == "throughput" for r in found) == 1
    out = capsys.readouterr()
    assert "measured" not in out.out and out.out.count("largest batch") == 4
    assert "something else holds 7.0 GB" in out.err


def test_what_does_not_fit_is_said(card, capsys):
    assert speed.main("--train digits --size 32 --batch 6 --precision fp32 --compiled= --rounds 2".split()) == 1
    assert "not run: train digits, 32 pixels, fp32: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


# --- what a step weighs, by the plan and by a step of tensors that have memory

ADDED = dict(repnadam=lambda g, r, **rep: RepNAdam(g, lr=r.lr, decoupled_weight_decay=True, **rep),
             replique=lambda g, r, **rep: rep_optimizer(torch.optim.Adagrad, "explicit")(g, lr=r.lr, **rep))


def weighed(recipe, name, images):
    "(bytes before a step, bytes at its peak)"
    with torch.device("meta"): scales = build_model(recipe.model, "target", recipe, 3).initial_scales()
    live = memory.Live()
    with live:
        net = build_model(recipe.model, "target", recipe, 3)
        opt = make_optimizer(name, net, recipe, scales if name.startswith("rep") else None)
        for p in net.parameters(): p.grad = torch.zeros_like(p)
        opt.step()
        opt.zero_grad()
        before = live.now
        x, y = torch.randn(images, 3, recipe.image_size, recipe.image_size), torch.zeros(images, dtype=torch.long)
        live.peak = 0
        timing.train_step(net, opt, x, y)
    return before, live.peak


@pytest.mark.parametrize("name", ["repsgd", *ADDED])
def test_the_plan_knows_what_a_step_weighs_with_an_added_optimizer_too(name, monkeypatch):
    for k, make in ADDED.items(): monkeypatch.setitem(OPTIMIZERS, k, make)
    recipe = Recipe.load("digits", precision="fp32", channels_last=False)
    found, (fixed, peak) = plan.footprint(recipe, optimizer=name, images=2), weighed(recipe, name, 2)
    assert found["fixed"] == pytest.approx(fixed, rel=.05) and found["peak"] == pytest.approx(peak, rel=.1)


def test_a_plan_of_an_added_optimizer_is_printed(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "repnadam", ADDED["repnadam"])
    assert any("1 GPU: 64 images each" in line for line in plan.plan("digits", optimizer="repnadam", time_it=False))
