"""A training run that says what it is doing, for the driver in test_interrupt.py.

With NET=plain, of a net without batch norm."""
import os, sys
from functools import partial, wraps
from pathlib import Path

import torch
from torch import nn

from repopt.lab import cli, loop, runs

FIRST = os.environ.get("RANK", "0") == "0"


def marked(name, says):
    "Let `loop.<name>` say `says` in $PHASE while it lasts"
    f, phase = getattr(loop, name), Path(os.environ["PHASE"])

    @wraps(f)
    def said(*a, **k):
        if FIRST: phase.write_text(says)
        try: return f(*a, **k)
        finally:
            if FIRST: phase.write_text("training")
    setattr(loop, name, said)


def keep_momentum():
    "Leave the optimizer's last state in $PHASE.optimizer: the package does not keep it"
    train = loop.train

    def kept(m):
        train(m)
        if FIRST: torch.save(m.opt.state_dict(), os.environ["PHASE"] + ".optimizer")
    loop.train = kept


class Double(nn.Module):
    def forward(self, x): return x.double()


def plain_net(name, mode, recipe, in_chans, scales=None):
    return nn.Sequential(Double(), nn.Conv2d(in_chans, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, recipe.num_classes)).double()


if __name__ == "__main__":
    runs.launch = partial(runs.launch, module="killed_run")         # --gpus 2: the processes are to be of this kind too
    if "PHASE" in os.environ:
        marked("_save", "saving")
        marked("evaluate", "evaluating")
        marked("train_step", "training")
        keep_momentum()
    if os.environ.get("NET") == "plain": loop.build_model = runs.build_model = plain_net
    sys.exit(cli.train())
