"""What no reader wants to read: that the package imports with what a bare GPU node has, and that a wheel carries its
files."""
import json, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

import forks
from run import project_notebooks

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(".".join(p.relative_to(ROOT/"repopt").with_suffix("").parts) for p in (ROOT/"repopt").rglob("*.py")
                 if not p.stem.startswith("_"))
LIGHT = ("torchvision", "torchao", "onnx", "onnxruntime", "onnxscript", "sklearn", "matplotlib", "pandas", "tqdm",
         "IPython", "fastcore", "nbdev", "papermill", "snakemake", "timm", "scipy")


def python(code, **kw):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **kw)


def test_every_module_imports_with_torch_numpy_safetensors_and_yaml_alone():
    block = ("import sys\nclass No:\n  def find_spec(self, name, *a):\n"
             f"    if name.split('.')[0] in {LIGHT!r}: raise ImportError('blocked: ' + name)\n"
             "sys.meta_path.insert(0, No())\n")
    r = python(block + f"import importlib\nfor m in {MODULES!r}: importlib.import_module('repopt.' + m)\nimport "
                       f"repopt\nfor n in repopt.__all__: getattr(repopt, n)")
    assert r.returncode == 0, r.stderr


def test_every_name_of_the_package_exists():
    import repopt
    assert set(dir(repopt)) == set(repopt.__all__)
    with pytest.raises(AttributeError, match="no attribute .RepLBFGS."): repopt.RepLBFGS


def test_wheel_carries_recipes(tmp_path):
    source = tmp_path/"source"
    source.mkdir()                               # setuptools builds in the source tree: not in ours
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/"repopt", source/"repopt")
    r = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path,
                        source], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for p in (ROOT/"repopt"/"assets").rglob("*.*"): assert str(p.relative_to(ROOT)) in names
    for p in (ROOT/"repopt").rglob("*.py"): assert str(p.relative_to(ROOT)) in names
    assert not any(n.startswith(("nbs/", "tests/", "build/")) for n in names)


COMMANDS = "search train plan quantize speed data scales records report evidence claims".split()
BAD = [("train", "--recipe", "nosuch"), ("search", "--recipe", "digits", "--set", "lr=fast"),
       ("train", "--recipe", "digits", "--model", "repoptvgg_z1"),
       ("train", "--recipe", "digits", "--optimizer", "repsgd"), ("speed", "--infer", "vgg99")]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "{(command, words): what `python -m repopt` ended with}; those that are asked for help with warnings as errors"
    strict = "import warnings\nwarnings.simplefilter('error')\n"
    lines = [(c, "--help") for c in COMMANDS] + BAD
    programs = [(strict*(words[-1] == "--help") + forks.MODULE, ["repopt", *words], ROOT) for words in lines]
    return dict(zip(lines, forks.each(programs, REPOPT_BUILD=str(tmp_path_factory.mktemp("build")))))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_say_how_they_are_used(command, said):
    r = said[command, "--help"]
    assert r.returncode == 0 and f"python -m repopt {command}" in r.stdout, r.stderr


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_exits_2_and_says_why(words, said):
    r = said[words]
    assert r.returncode == 2 and r.stderr.startswith("error: ") and "Traceback" not in r.stderr, r.stderr


PAPERMILL = {"04_hyper_search", "05_train_imagenet", "05a_speed", "05b_ablations", "06_quantization", "07_paper"}


def test_notebooks_are_clean_and_in_step_with_the_package():
    for p in project_notebooks():
        nb = json.loads(p.read_text())
        assert all(c.get("execution_count") is None for c in nb["cells"]), p.name
        if any("papermill" in c["metadata"] for c in nb["cells"]): pytest.fail(f"{p.name} was written by papermill")
        tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == (p.stem in PAPERMILL), p.name
