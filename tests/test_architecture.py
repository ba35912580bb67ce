"""The house rules that a machine can check: import directions, sizes, no torch in plans."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "growmoe"
LEAVES = {"errors", "files", "memory", "progress", "__init__"}
TORCH_FREE_MODELS = {
    "config", "families", "footprint", "gguf_arch", "gguf_header", "gguf_tokenizer", "growing",
    "presets", "safetensors_header", "shapes", "stored", "targets", "upcycling",
}  # fmt: skip
# read only when a recipe is given a tokenizer
LATE = {"growmoe.data.tokenizer"}
# what each part may import (besides itself and the leaves)
ALLOWED = {
    "errors": set(),
    "files": set(),
    "memory": set(),
    "progress": set(),
    "__init__": set(),
    "recipe": set(),
    "recipe_yaml": {"recipe"},
    "ops": set(),
    "data": set(),
    "models": {"recipe", "ops"},
    "hf": {"models"},
    "hf_experts": {"ops"},
    "growth": {"recipe", "ops", "models"},
    "planning": {"recipe", "models", "ops", "data"},
    "training": {"recipe", "ops", "models", "data"},
    "inference": {"recipe", "ops", "models", "data"},
    "evaluation": {"recipe", "models", "data", "training", "inference"},
    "report": {"recipe", "data", "training"},
    "artifacts": {"recipe", "models", "growth", "data", "training", "inference", "evaluation"},
    "tokenizer_check": {"models", "data"},
    "publishing": {
        "artifacts", "tokenizer_check", "recipe", "models", "growth", "planning", "data",
        "training",
    },
    "stages": {
        "artifacts", "publishing", "tokenizer_check", "recipe", "recipe_yaml",
        "ops", "models", "growth", "planning", "data",
        "training", "inference", "evaluation", "report",
    },
    "pipeline": {"planning", "recipe", "report", "stages"},
    "cli": {"pipeline", "planning", "recipe_yaml", "report", "stages"},
    "__main__": {"cli"},
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    part = part_of(file)
    for name in imports_of(file):
        if name == "growmoe" or not name.startswith("growmoe."):
            continue
        target = name.split(".")[1]
        if part == "stages" and target == "stages":
            pytest.fail(f"{file.name} imports another stage ({name})")
        if target == part or target in LEAVES:
            continue
        assert target in ALLOWED[part], f"{file.name} may not import {name}"
        if part == "planning" and name not in LATE:
            assert target != "data", f"{file.name} imports {name}"
        if part == "planning" and target == "ops":
            assert name == "growmoe.ops.library", f"{file.name} imports {name}"
        if part == "planning" and target == "models" and name not in LATE:
            assert name.split(".")[2] in TORCH_FREE_MODELS, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_distributed_makes_process_groups(file: Path) -> None:
    if part_of(file) != "distributed":
        assert not [name for name in imports_of(file) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, (
                f"{file.name}: {node.name} is too long"
            )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_names_have_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), f"{file} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"


@pytest.mark.parametrize(
    "module",
    [
        "cli", "recipe_yaml", "planning.recipes", "models.presets", "models.gguf_arch",
        "models.gguf_tokenizer", "ops.library",
    ],
)  # fmt: skip
def test_planning_and_help_do_not_import_torch(module: str) -> None:
    code = f"import sys, growmoe.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, growmoe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
