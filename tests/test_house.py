"""Two storeys: the library, repopt/*.py, and the laboratory, repopt/lab/*.py, which imports the library and is never
imported by it."""
import ast, importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
           for p in (ROOT/"repopt").rglob("*.py") if p.stem != "_modidx"}
DOOR = "repopt.__main__"


def imported(name) -> set:
    "The modules of repopt that the module `name` imports, anywhere in it"
    found, package = set(), name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for n in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(n, ast.Import): found |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(filter(None, [*package.split(".")[:len(package.split(".")) - n.level + 1]*bool(n.level),
                                          n.module]))
            found |= {m if (m := f"{base}.{a.name}") in MODULES else base for a in n.names}
    return {m for m in found if m in MODULES} - {name}


ARROWS = {m: imported(m) for m in MODULES}


def test_the_arrows_are_seen():
    assert {"repopt.csla", "repopt.grad_mult"} <= ARROWS["repopt.scales"] and {
        "repopt.scales", "repopt.lab.records"} <= ARROWS["repopt.lab.training"] | ARROWS["repopt.lab.cli"]
    assert ARROWS[DOOR] == {"repopt.lab.cli"} and len(MODULES) > 20


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not m.startswith("repopt.lab") and m != DOOR))
def test_the_library_does_not_know_the_laboratory(module):
    assert not [m for m in ARROWS[module] if m.startswith("repopt.lab")]


def test_no_arrow_comes_back():
    left = {m: {*to} for m, to in ARROWS.items()}
    while ready := [m for m, to in left.items() if not to & left.keys()]:
        for m in ready: del left[m]
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_the_library_works_without_the_laboratory():
    code = ("import sys, importlib\nclass No:\n  def find_spec(self, name, *a):\n    if name.startswith('repopt.lab'): "
            "raise ImportError(name)\nsys.meta_path.insert(0, No())\n"
            f"for m in {sorted(m for m in MODULES if not m.startswith('repopt.lab') and m != DOOR)!r}: "
            f"importlib.import_module(m)\n")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr


def runner():
    spec = importlib.util.spec_from_file_location("run", ROOT/"tests/run.py")
    spec.loader.exec_module(run := importlib.util.module_from_spec(spec))
    return run


def books(root): return [p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]


def test_every_module_has_its_notebook_and_every_notebook_a_name_of_its_own():
    exports = {m[1] for p in books(ROOT) if (m := re.search(r'#\| ?default_exp ([\w.]+)', p.read_text()))}
    by_hand = {"repopt", "repopt.lab", DOOR}
    assert {f"repopt.{e}" for e in exports - {"none"}} == set(MODULES) - by_hand
    names = [p.name for p in books(ROOT)]
    assert len(names) == len(set(names))                                     # nbdev_test tells them by these


def test_the_runner_and_make_see_every_notebook():
    pattern = runner().NOTEBOOK
    tracked = subprocess.run(["git", "ls-files", "nbs"], cwd=ROOT, capture_output=True,
                             text=True).stdout.split() or [str(p.relative_to(ROOT)) for p in books(ROOT)]
    for p in tracked: assert not p.endswith(".ipynb") or re.fullmatch(pattern, Path(p).name), p
    code = ("from nbdev.doclinks import nbglob\n"
            f"print(*sorted(p.name for p in nbglob(None, as_path=True, file_re={f'^{pattern}$'!r})))")
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert seen.stdout.split() == sorted(Path(p).name for p in tracked if p.endswith(".ipynb")), seen.stderr
    made = subprocess.run(["make", "-n", "notebooks"], cwd=ROOT, capture_output=True, text=True).stdout
    for p in tracked: assert p in made or not p.endswith(".ipynb"), p


def test_a_broken_cell_in_the_laboratory_is_a_failure(tmp_path):
    (tmp_path/"nbs/lab").mkdir(parents=True)
    (tmp_path/"tests").mkdir()
    (tmp_path/"repopt").mkdir()
    shutil.copy(ROOT/"settings.ini", tmp_path)
    shutil.copy(ROOT/"tests/run.py", tmp_path/"tests")
    def book(source):
        return json.dumps(dict(cells=[dict(cell_type="code", id="aaaa0000", metadata={}, execution_count=None,
                                           outputs=[], source=source)], nbformat=4, nbformat_minor=5,
                               metadata=dict(kernelspec=dict(name="python3", display_name="python3",
                                                             language="python"))))
    (tmp_path/"nbs/00_good.ipynb").write_text(book("1 + 1"))
    (tmp_path/"nbs/lab/a_bad.ipynb").write_text(book("assert 1 == 2"))
    code = "import sys; sys.path.insert(0, 'tests'); import run; print('counted', *run.notebooks(1)[:2])"
    r = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "counted 1 1" in r.stdout, r.stdout + r.stderr


# --- how the code reads, counted. What is over and waits to be written anew stands in WAITS by its module; a new one is
# not added: it is mended.

LINES, FUNCTION, COLUMNS = 400, 40, 120
WAITS = {
    "modules": set(),
    "functions": set(),
    "private": set(),
    "untyped": {"terms", "engine", "quantization", "lab.data", "lab.speed", "lab.timing",
                "lab.memory", "lab.plots", "lab.runs", "lab.cli"},
    "figures": {"lab.int8.plot_layers", "lab.int8.figure3", "lab.int8.figure5"}}
WRITTEN = {m.removeprefix("repopt."): p.read_text() for m, p in MODULES.items()}


def named_functions(body, inside=""):
    "(name with its class or function, definition) of everything that is defined in `body`, in other definitions too"
    for n in body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): yield inside + n.name, n
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield from named_functions(n.body, f"{inside}{n.name}.")


FUNCTIONS = {(m, name): f for m, text in WRITTEN.items() for name, f in named_functions(ast.parse(text).body)}


def test_no_line_of_the_package_is_too_long():
    over = [f"{m}:{i}" for m, text in WRITTEN.items() for i, line in enumerate(text.splitlines(), 1)
            if len(line) > COLUMNS and not line.startswith("__all__ = ")]                # nbdev writes that one
    assert not over


def test_no_module_is_too_long():
    over = {m for m, text in WRITTEN.items() if len(text.splitlines()) > LINES}
    assert over <= WAITS["modules"], f"more than {LINES} lines: {sorted(over - WAITS['modules'])}"


def test_no_function_is_too_long():
    over = {f"{m}.{name}" for (m, name), f in FUNCTIONS.items() if f.end_lineno - f.lineno >= FUNCTION}
    assert over <= WAITS["functions"], f"more than {FUNCTION} lines: {sorted(over - WAITS['functions'])}"


def test_no_module_takes_what_another_keeps_to_itself():
    over = {m: [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)
                and (n.level or str(n.module).startswith("repopt")) for a in n.names if a.name.startswith("_")]
            for m, text in WRITTEN.items()}
    over = {m: names for m, names in over.items() if names and m not in WAITS["private"]}
    assert not over, f"private names of other modules: {over}"


def test_no_method_is_put_into_a_class_from_outside():
    classes = {m: {n.name for n in ast.parse(text).body if isinstance(n, ast.ClassDef)} for m, text in WRITTEN.items()}
    over = [f"{m}: {ast.unparse(n)}" for m, text in WRITTEN.items() for n in ast.parse(text).body
            if isinstance(n, ast.Assign) and m not in WAITS["untyped"]
            for a in ast.walk(n.targets[0]) if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name)
            and a.value.id in classes[m]]
    assert not over


def says_its_types(f):
    arguments = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
    return all(a.annotation for a in arguments) and (f.returns or f.name == "__init__")


def test_public_names_say_their_types():
    public = {f"{m}.{name}": f for (m, name), f in FUNCTIONS.items() if m not in WAITS["untyped"]
              and not any(part.startswith("_") for part in name.replace(".__init__", "").split("."))}
    local = {f"{m}.{name}.{inner}" for (m, name), f in FUNCTIONS.items() for inner, _ in named_functions(f.body)}
    over = {name for name, f in public.items() if name not in local and not says_its_types(f)}
    assert over <= WAITS["figures"], f"without types: {sorted(over - WAITS['figures'])}"
