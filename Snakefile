# The argument of the paper as a graph of notebooks: Hyper-Search -> training -> quantization -> tables and figures.
# One rule an experiment notebook, executed by papermill. The executed notebook is the rule's log, so that it survives a failure;
# records go to figures/runs, runs and marks to build/ (git-ignored): a fresh clone really trains.
#
#   snakemake --profile profiles/local            the digits recipe, five seeds, in the environment of snakemake itself
#   snakemake --profile profiles/local --config recipe=cifar seeds=1 data=/data
#   snakemake --profile profiles/slurm figures --config recipe=imagenet data=/data
# `search` names the recipe that finds the scales where it is not to be digits (of digits) or cifar (of the others); `epochs` are the recipe's own, cut short.
import fcntl
import sys
from pathlib import Path
import yaml

ROOT = Path(workflow.basedir)
RECIPES = ROOT/"repopt"/"assets"/"recipes"
RECIPE, SEARCH = config.get("recipe", "digits"), config.get("search", "")
SEEDS, DATA, EPOCHS = config.get("seeds", 5), config.get("data", ""), config.get("epochs", "")
ALL = workflow.resource_settings.cores or 2                                # on a cluster profiles/slurm says how many
OUT = Path(str(config.get("out", "figures"))).absolute()


def refuse(what):
    print(f"error: {what}", file=sys.stderr)
    sys.exit(2)


for key, name in dict(recipe=RECIPE, search=SEARCH or "digits").items():
    known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if str(name) not in known: refuse(f"{key}={name} is no recipe: there are {', '.join(known)}")
for key, number in dict(seeds=SEEDS, epochs=1 if EPOCHS == "" else EPOCHS).items():
    if type(number) is not int or number < 1: refuse(f"{key}={number} must be a whole number, at least 1")


def hold():
    "Keep other calls out of this folder while this one lasts. The lock goes with the process, also with a killed one."
    Path("build").mkdir(exist_ok=True)
    lock = open("build/.lock", "w")
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: refuse(f"another call is at work in {Path.cwd()}: wait for it, or end it first")
    return lock


if workflow.is_main_process and not workflow.dryrun: LOCK = hold()
FLOORS = ("published csla grad_mult scales rules engine contract explicit optim doctor models repghost search __main__ "
          "lab/records lab/pictures lab/packed lab/augment lab/batches lab/data lab/checkpoint lab/distributed "
          "lab/recipes lab/training lab/loop lab/runs lab/timing lab/memory lab/plan lab/cli lab/plots").split()


def modules(*names): return [f"repopt/{n}.py" for n in (*FLOORS, *names)]


def search(wildcards):
    "The recipe by which the scales of a recipe's net are searched: digits on digits, else CIFAR-100"
    return SEARCH or ("digits" if wildcards.recipe == "digits" else "cifar")


def recipes(wildcards):
    "What the notebooks of a recipe read: its own file, and that of the search it builds on"
    return sorted({f"repopt/assets/recipes/{n}.yaml" for n in (wildcards.recipe, search(wildcards))})


def own(wildcards): return search(wildcards) == wildcards.recipe             # then epochs are the search's too


def given(**parameters): return [word for k, v in parameters.items() if v for word in ("-p", k, str(v))]


def searching(wildcards):
    model = yaml.safe_load((RECIPES/f"{wildcards.recipe}.yaml").read_text())["model"]
    return given(recipe=search(wildcards), model=model, epochs=own(wildcards) and EPOCHS)


def training(wildcards): return given(recipe=wildcards.recipe, epochs=EPOCHS, search=not own(wildcards) and search(wildcards))


def telling(wildcards): return given(recipe=wildcards.recipe, epochs=EPOCHS)


COMMON = given(seeds=SEEDS, out=OUT, data=DATA and Path(str(DATA)).absolute())
PAPERMILL = ("exec {sys.executable:q} profiles/tied.py {sys.executable:q} -m papermill "
             "nbs/{params.notebook}.ipynb {log:q} --cwd nbs "
             "--log-level ERROR --no-progress-bar --stdout-file /dev/stdout {params.asked:q} {params.common:q}")


rule figures:
    input: f"build/marks/{RECIPE}/07_paper.done"


rule hyper_search:
    input: recipes, modules("lab/hyper_search"), notebook="nbs/04_hyper_search.ipynb"
    output: touch("build/marks/{recipe}/04_hyper_search.done")
    log: "build/notebooks/{recipe}/04_hyper_search.ipynb"
    params: notebook="04_hyper_search", asked=searching, common=COMMON
    threads: ALL
    shell: PAPERMILL


rule train:
    input: recipes, modules(), "build/marks/{recipe}/04_hyper_search.done", notebook="nbs/05_train_imagenet.ipynb"
    output: touch("build/marks/{recipe}/05_train_imagenet.done")
    log: "build/notebooks/{recipe}/05_train_imagenet.ipynb"
    params: notebook="05_train_imagenet", asked=training, common=COMMON
    threads: ALL
    shell: PAPERMILL


rule quantize:
    input: recipes, modules("quantization", "deployment", "lab/int8"), "build/marks/{recipe}/05_train_imagenet.done", notebook="nbs/06_quantization.ipynb"
    output: touch("build/marks/{recipe}/06_quantization.done")
    log: "build/notebooks/{recipe}/06_quantization.ipynb"
    params: notebook="06_quantization", asked=training, common=COMMON
    threads: ALL
    shell: PAPERMILL


rule paper:
    input: recipes, modules("lab/hyper_search", "quantization", "deployment", "lab/int8", "lab/report", "lab/queries", "lab/protocol", "lab/figures", "lab/ablations", "lab/evidence", "lab/verdicts", "lab/proofs", "lab/claims"), "repopt/assets/claims.yaml", "repopt/assets/protocol.yaml", "build/marks/{recipe}/06_quantization.done", notebook="nbs/07_paper.ipynb"
    output: touch("build/marks/{recipe}/07_paper.done")
    log: "build/notebooks/{recipe}/07_paper.ipynb"
    params: notebook="07_paper", asked=telling, common=COMMON
    shell: PAPERMILL
