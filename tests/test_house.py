"""The rules of the house: what stands where, and that what stands twice is the same."""
import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "vit.py")
METHODS = [path for path in SCRIPTS if path.name != "pack.py"]
RULER = "# -------------------------------------------------------------------- "
OF_EACH_SCRIPT = {"main", "build", "parse_args", "load_teacher", "RECIPES"}  # same role, another content


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


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_script_imports_only_vit_of_ours_the_network_first_and_the_kit_below_its_ruler(path):
    allowed = {"vit", "torch", "torchvision", "numpy", "tqdm", "PIL"} | set(sys.stdlib_module_names)
    text, of_vit = path.read_text(), []
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {module.split(".")[0] for module in modules} <= allowed
        of_vit += [node] if "vit" in modules else []
    network, kit = of_vit
    part_1, part_2 = (ROOT / "vit.py").read_text().split(RULER + "part 2: the training kit\n")
    for names, part in ((network.names, part_1), (kit.names, part_2)):
        defined = {name for node in ast.parse(part).body for name in ([node.name] if hasattr(node, "name") else
                   [x.id for target in getattr(node, "targets", []) for x in ast.walk(target) if isinstance(x, ast.Name)])}
        assert {alias.name for alias in names} <= defined
    assert text.splitlines()[kit.lineno - 2] == RULER + "the recipe"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_script_has_its_rulers_a_short_main_and_no_loop_over_the_blocks_of_a_vit(path):
    text = path.read_text()
    rulers = [line.removeprefix(RULER) for line in text.splitlines() if line.startswith(RULER)]
    assert rulers[0].startswith("the method") and rulers[-2:] == ["the recipe", "the run"]
    for node in ast.parse(text).body:
        if getattr(node, "name", "") in ("main", "train", "generic", "specific"):
            assert node.end_lineno - node.lineno < 40, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
    assert not re.search(r"for [\w, ]+ in (enumerate\()?[\w.]*(encoder|vit|teacher|self|model)\.blocks", text)


def test_part_1_of_vit_stands_alone(tmp_path):
    pytest.importorskip("torch")
    text = (ROOT / "vit.py").read_text()
    assert text.count(RULER + "part 2: the training kit\n") == 1
    part = text[:text.index(RULER + "part 2")]
    imported = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(part)) if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert imported <= {"argparse", "math", "warnings", "torch", "torch.nn.functional", "torchvision.ops"}
    (tmp_path / "vit.py").write_text(part)
    code = ("import torch, vit; m = vit.ViT(image_size=(8, 12), patch_size=4, width=16, depth=2, heads=2, classes=3); "
            "torch.save(dict(model=m.state_dict(), config=m.config), 'model.pth'); m = vit.ViT.from_file('model.pth'); "
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


def test_nothing_but_the_start_of_a_program_and_run_writes_to_args():
    for path in [ROOT / "vit.py", *SCRIPTS]:
        for outer in ast.parse(path.read_text()).body:
            written = [node for node in ast.walk(outer) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                       and isinstance(node.value, ast.Name) and node.value.id == "args"]
            assert not written or outer.name in ("complete", "parse_args", "start", "Run"), f"{path.name}:{written[0].lineno}"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_every_recipe_sets_only_options_that_exist_and_every_option_has_a_help_text(path, monkeypatch):
    pytest.importorskip("torch")
    from importlib import import_module

    import vit
    script, parsers = import_module(path.stem), []
    common = vit.common_options
    monkeypatch.setattr(script, "common_options", lambda *values: parsers.append(common(*values)) or parsers[-1])
    for recipe, values in script.RECIPES.items():
        stage = ["--stage", "specific"] if recipe.endswith("-specific") else []
        with pytest.raises(SystemExit):
            script.parse_args([*stage, "--recipe", recipe, "--help"])
        actions = {action.dest: action for action in parsers[-1]._actions}
        assert set(values) <= set(actions) | {"mean", "std", "decoder_config"}, f"{path.name}, recipe {recipe}"
        assert all(action.help for action in actions.values())
