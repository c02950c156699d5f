"""The direction of imports: a module may import what stands above it in ROOMS or beside it, never what is below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    {"process", "commands", "launcher"},
    {"files", "distributed", "progress"},
    {"config", "preprocess", "shard_format"},
    {"records", "sources", "losses", "standardise", "augment", "measures", "adapters"},
    {"cache", "plan", "decode", "backbones", "teacher_records"},
    {"verify", "writer", "upgrade", "reader", "sampling", "stream", "raw_images", "models", "checkpoint", "metrics",
     "run_folder", "drop_path"},
    {"report", "engine", "cached_dataset",
     "teacher_identity", "teacher_cache", "teacher_outputs", "teacher_images", "teacher_survey",
     "teacher_basis", "teacher_writer", "teacher_verify", "teacher_targets", "teacher_plan"},
    {"loader", "build", "command_line", "planner"},
    {"evaluate", "export", "teacher_open", "teacher_pass", "pictures", "run_evaluation"},
]  # fmt: skip
# what runs before anything slow is imported: configuration errors and --help answer in about a second
LIGHT = ["process", "commands", "launcher", "files", "progress", "config", "preprocess", "shard_format", "records",
         "cache", "plan", "decode", "sources", "losses_table", "writer", "verify", "command_line", "teacher_records",
         "planner", "planner_cache"]  # fmt: skip


def level_of(module: str) -> int:
    name = module.split(".")[0]
    for level, room in enumerate(ROOMS):
        if name in room or any(name.startswith(f"{member}_") for member in room):
            return level
    raise AssertionError(f"distillery/{module}.py has no room in ROOMS")


def imports_of(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += (
                [node.module] if node.module != "distillery" else [f"distillery.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions and of `if TYPE_CHECKING`."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    return ast.Module(body=kept, type_ignores=[])


def modules() -> list[Path]:
    return sorted((ROOT / "distillery").glob("[!_]*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_no_module_imports_one_to_its_right(path):
    tree = ast.parse(path.read_text())
    own = level_of(path.stem)
    # main() of a command may call anything
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    for module in imports_of(tree):
        if module.startswith("distillery."):
            assert level_of(module.removeprefix("distillery.")) <= own, f"{path.name} imports {module}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_neither_torch_nor_datasets_at_the_top(name):
    path = ROOT / "distillery" / f"{name}.py"
    slow = {"torch", "timm", "torchvision", "datasets", "sklearn", "matplotlib", "tensorboard"}
    assert slow.isdisjoint(module.split(".")[0] for module in imports_of(top_level(ast.parse(path.read_text()))))


def test_no_module_hides_a_package():
    names = {path.stem for path in modules()}
    assert names.isdisjoint({"datasets", "timm", "logging", "types", "queue", "torch", "numpy"})
