"""The rules of the house that a reader of the sources can check: who imports whom, and how long a file is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("rwkv_jax", "configs", "experiments") for path in (ROOT / folder).rglob("*.py"))

# A module may import those of its own line and of lines further down; no two of a line may need each other.
ORDER = (
    {"experiments"},
    {"configs"},
    {"train", "launch", "pretrained", "finetune", "harness"},
    {"run_config"},
    {"generate", "evaluate", "interop", "checkpoint", "parallel", "optim", "metrics", "hardware"},
    {"data", "mixture", "orders", "corpora", "tokenizers", "models"},
    {"ops"},
)
RANK = {name: len(ORDER) - i for i, line in enumerate(ORDER) for name in line}
EDGES = {"run_config", "configs", "experiments"}  # where absl and ml_collections are at home
NO_PRIVATE_NAMES = {"jax", "flax", "optax", "orbax", "grain"}


def module_of(path: Path) -> str:
    """The room that a file belongs to: "ops" for rwkv_jax/ops/wkv4.py, "train", "experiments", "configs"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "rwkv_jax" else parts[0]


def imports(path: Path):
    """Dotted names that a file imports, those inside functions included: "jax.numpy", "rwkv_jax.models.build"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(path: Path):
    """Rooms of this project that a file imports."""
    for name in imports(path):
        first, *rest = name.split(".")
        if first in ("experiments", "configs"):
            yield first
        elif first == "rwkv_jax" and rest:
            yield rest[0]


ids = lambda path: str(path.relative_to(ROOT))


def test_the_rules_see_every_module():
    found = {module_of(path) for path in SOURCES} - {"__init__"}
    assert {"ops", "models", "interop", "train"} <= found <= RANK.keys()
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "rwkv_jax")]
    assert {path.parent for path in package} >= {ROOT / "rwkv_jax" / room for room in ("ops", "models", "interop")}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_point_one_way(path):
    here = module_of(path)
    for room in rooms(path):
        # a name of the table of contents, such as rwkv_jax.build, says nothing about where it lives
        assert room in RANK, f"import {room} from its own module"
        assert RANK[room] <= RANK[here], f"{here} imports {room}"


def test_no_two_modules_need_each_other():
    needs = {}
    for path in SOURCES:
        needs.setdefault(module_of(path), set()).update(set(rooms(path)) - {module_of(path)})
    while needs:
        free = [room for room, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for room in free:
            del needs[room]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_what_a_room_may_import(path):
    here, names = module_of(path), set(imports(path))
    roots = {name.split(".")[0] for name in names}
    if here == "ops":
        assert roots <= {"jax", "rwkv_jax", *sys.stdlib_module_names}
    if here == "models":
        assert not any(name.startswith("jax.sharding") for name in names)
    if here not in EDGES:
        assert not roots & {"absl", "ml_collections"}
    assert not roots & {"torch", "transformers"} or here == "experiments"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_no_private_names_of_libraries(path):
    private = lambda name: any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    of_libraries = [name for name in imports(path) if name.split(".")[0] in NO_PRIVATE_NAMES]
    assert not [name for name in of_libraries if private(name)]
    tree = ast.parse(path.read_text())
    bound = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0] in NO_PRIVATE_NAMES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            assert not (isinstance(root, ast.Name) and root.id in bound), ast.unparse(node)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=ids)
def test_a_file_ends_before_line_400(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_imports_nothing_else():
    program = "import sys; before = set(sys.modules); import rwkv_jax; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for name in run.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names} == {"rwkv_jax"}


def test_every_name_of_the_contents_can_be_had():
    program = "import rwkv_jax; print(*[f'{n}:{getattr(rwkv_jax, n).__name__}' for n in dir(rwkv_jax)])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = dict(pair.split(":") for pair in run.stdout.split())
    assert {"build", "load", "save", "generate", "stream"} <= names.keys()
    assert names["build"] == "build" and names["ops"] == "rwkv_jax.ops"


def test_a_name_that_is_not_there_is_an_attribute_error():
    import rwkv_jax

    with pytest.raises(AttributeError, match="module 'rwkv_jax' has no attribute 'biuld'"):
        _ = rwkv_jax.biuld
