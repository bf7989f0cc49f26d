"""RepOptimizers: the priors of a model with branches, moved into the optimizer of a plain one.

See nbs/ for the argument, README.md for the way in."""
__version__ = "0.1.0"

from importlib import import_module

_HOME = {name: module for module, names in {
    "csla": "Block Branch CSLA Conv Depthwise Identity",
    "grad_mult": "GradMult rep_branches",
    "scales": "Scales extract_scales load_scales",
    "rules": "register_rule",
    "groups": "param_groups",
    "contract": "RepOptimizer",
    "optim": "RepASGD RepAdadelta RepAdagrad RepAdam RepAdamW RepAdamax RepLion RepNAdam RepRAdam RepRMSprop RepRprop "
             "RepSGD attach clip_grad_norm_ rep_optimizer",
    "doctor": "check_equivalence",
    "models": "merge to_branches",
    "repghost": "create_model initial_scales",  # those of models, with every family of nets
    "lab.recipes": "Recipe",
    "lab.runs": "Run run run_all",
    "search": "eligible to_hyper_search",
    "quantization": "quantize quantize_aware",
    "deployment": "export_int8",
}.items() for name in names.split()}

__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    """Names are found in their module when they are first used, so that `import repopt` costs nothing and `python -m
    repopt …` runs cleanly."""
    if name not in _HOME: raise AttributeError(f"module 'repopt' has no attribute {name!r}")
    return getattr(import_module(f"repopt.{_HOME[name]}"), name)


def __dir__(): return sorted(__all__)
