"""The rules of the house: what stands where, and that what stands twice is the same."""
import ast
import difflib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "vit.py")
RULER = "# -------------------------------------------------------------------- part 2: the training kit\n"
OF_EACH_SCRIPT = {"main", "build", "check", "load_teacher", "RECIPES", "OPTIONS"}  # same role, another content


def definitions(path: Path) -> dict[str, str]:
    """Source of every function, class and constant at the top level, with decorators and the comments inside."""
    text = path.read_text()
    lines, found = text.splitlines(True), {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.update({name: "".join(lines[first - 1:node.end_lineno]) for name in names})
    return found


def test_one_name_has_one_source():
    seen: dict[str, tuple[str, str]] = {}
    for path in [ROOT / "vit.py", *SCRIPTS]:
        for name, source in definitions(path).items():
            if name in OF_EACH_SCRIPT:
                continue
            where, first = seen.setdefault(name, (path.name, source))
            diff = "".join(difflib.unified_diff(first.splitlines(True), source.splitlines(True), f"{where}: {name}", f"{path.name}: {name}"))
            assert not diff, "\n" + diff


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_only_vit_of_ours_and_only_the_named_packages(path):
    allowed = {"vit", "torch", "torchvision", "numpy", "tqdm", "PIL"} | set(sys.stdlib_module_names)
    lines = 0
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        lines += "vit" in modules
        assert {module.split(".")[0] for module in modules} <= allowed
    assert lines == 1, "everything of vit.py comes by one line"


def test_part_1_of_vit_stands_alone(tmp_path):
    pytest.importorskip("torch")
    text = (ROOT / "vit.py").read_text()
    assert text.count(RULER) == 1
    part = text[:text.index(RULER)]
    imported = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(part)) if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert imported <= {"argparse", "math", "torch", "torch.nn.functional", "torchvision.ops"}
    (tmp_path / "vit.py").write_text(part)
    code = ("import torch, vit; m = vit.ViT(image_size=(8, 12), patch_size=4, width=16, depth=2, heads=2, classes=3); "
            "print(m(torch.zeros(2, 3, 8, 12)).shape)")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "torch.Size([2, 3])", run.stderr


@pytest.mark.parametrize("path", [ROOT / "vit.py", *SCRIPTS], ids=lambda path: path.name)
def test_lines_are_short_and_nothing_happens_at_import(path):
    long = [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, f"lines over 120 columns: {long}"
    for node in ast.parse(path.read_text()).body:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not call, f"{path.name}:{node.lineno} runs at import"


def test_every_recipe_sets_only_options_that_exist():
    pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT))
    from importlib import import_module
    from vit import COMMON_OPTIONS
    for path in SCRIPTS:
        script = import_module(path.stem)
        known = {name for table in (COMMON_OPTIONS, script.OPTIONS) for group in table.values() for name in group}
        for recipe, values in script.RECIPES.items():
            assert set(values) <= known | {"mean", "std"}, f"{path.name}, recipe {recipe}"
