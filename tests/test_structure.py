"""Rules that hold for the sources: imports, names of kinds, and the places of tests."""

import ast
import collections
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("rwkv_jax", "configs", "experiments") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}

# A part may import those of its own line and of lines below; no two of a line may need each other.
ORDER = (
    {"experiments"},
    {"configs"},
    {"commands"},
    {"pretrained", "finetune", "harness", "doctor"},
    {"train"},
    {"generate", "evaluate", "runs", "interop", "checkpoint", "hardware"},
    {"data", "models"},
    {"ops", "files", "command"},
)
RANK = {name: len(ORDER) - i for i, line in enumerate(ORDER) for name in line}
EDGES = {"run_config.py", "configs", "experiments"}  # files and parts that may import absl and ml_collections
PURE = ("step", "methods", "optim")  # modules of train with arrays in and arrays out
LIBRARIES = ("jax.", "flax.", "optax.", "orbax.", "grain.")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The part of the project that a file belongs to: "ops" for rwkv_jax/ops/wkv4.py, "train", "experiments",
    "configs".

    A `__main__.py` is a command, which ranks above the part in whose folder it is: no module may import it.
    """
    if path.name == "__main__.py":
        return "commands"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "rwkv_jax" else parts[0]


def imports(tree):
    """Dotted names that a file imports, also inside functions: "jax.numpy", "rwkv_jax.models.build"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


IMPORTS = {path: set(imports(tree)) for path, tree in TREES.items()}


def imported_parts(path: Path):
    """Parts of this project that a file imports."""
    for name in IMPORTS[path]:
        first, *rest = name.split(".")
        if first in ("experiments", "configs"):
            yield first
        elif first == "rwkv_jax" and rest:
            yield "commands" if "__main__" in rest else rest[0]


def private_names(source, names):
    """Private names of libraries that a file imports, or reads from a module that it imports."""
    yield from (name for name in names if name.startswith(LIBRARIES) and re.search(r"\._(?!_)", name))
    modules = "jax|jnp|lax|flax|nn|struct|optax|orbax|ocp|grain"
    yield from (found[0] for found in re.finditer(rf"\b({modules})(\.\w+)*\._(?!_)\w+", source))


def forbidden_imports(here: str, names):
    """Imports that are not allowed in a part."""
    for name in names:
        root = name.split(".")[0]
        wrong = (
            here == "ops" and root not in {"jax", "rwkv_jax", *sys.stdlib_module_names},
            here == "models" and name.startswith("jax.sharding"),
            here not in EDGES and root in {"absl", "ml_collections"},
            here != "experiments" and root in {"torch", "transformers"},
        )
        if any(wrong):
            yield name


def test_imports_point_one_way():
    wrong = [f"{name_of(path)}: relative {name}" for path in SOURCES for name in IMPORTS[path] if name[0] == "."]
    for path in SOURCES:
        here = module_of(path)
        for part in imported_parts(path):
            # a lazy name of the package, such as rwkv_jax.build, does not show its module
            if part not in RANK:
                wrong.append(f"{name_of(path)}: import {part} from its own module")
            elif RANK[part] > RANK[here]:
                wrong.append(f"{name_of(path)}: {here} imports {part}")
    assert not wrong, "\n".join(wrong)


def test_imports_of_modules_form_no_cycle():
    needs = collections.defaultdict(set)
    for path in SOURCES:
        needs[module_of(path)] |= set(imported_parts(path)) - {module_of(path)}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_imports_of_experiments_form_no_cycle():
    """Any of their files may be run as the command: the effect of a cycle depends on where it is entered."""
    modules = {name_of(path)[:-3].replace("/", "."): path for path in SOURCES if module_of(path) == "experiments"}
    needs = {
        name: {n for n in modules for x in IMPORTS[path] if x == n or x.startswith(f"{n}.")}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_imports_of_each_part_are_allowed_there():
    part = lambda path: path.name if path.name in EDGES else module_of(path)
    found = ((path, forbidden_imports(part(path), IMPORTS[path])) for path in SOURCES)
    wrong = [f"{name_of(path)}: {name}" for path, names in found for name in names]
    assert not wrong, "\n".join(wrong)


def test_step_imports_neither_files_nor_sampling():
    for name in PURE:
        path = ROOT / "rwkv_jax" / "train" / f"{name}.py"
        own = {imported for imported in IMPORTS[path] if imported.startswith("rwkv_jax.")}
        allowed = ("rwkv_jax.models", *(f"rwkv_jax.train.{other}" for other in PURE))
        assert own and all(imported.startswith(allowed) for imported in own), f"{name_of(path)}: {own}"


def test_sources_use_no_private_names_of_libraries():
    wrong = [f"{name_of(path)}: {name}" for path in SOURCES for name in private_names(path.read_text(), IMPORTS[path])]
    assert not wrong, "\n".join(wrong)


def test_forbidden_imports_and_private_names_find_offenders():
    """The other tests pass on a clean project; this source breaks the rules."""
    dirty = "from jax import _src\nimport flax.linen as nn\nfrom . import a\nnn.module._x\nnn.__doc__\n"
    names = set(imports(ast.parse(dirty)))
    assert names == {"jax._src", "flax.linen", "..a"}
    assert set(private_names(dirty, names)) == {"jax._src", "nn.module._x"}
    assert list(forbidden_imports("ops", ["numpy", "jax.numpy", "math"])) == ["numpy"]
    wrong = ["jax.sharding.Mesh", "absl.flags", "torch"]
    assert list(forbidden_imports("models", wrong)) == wrong
    assert not list(forbidden_imports("experiments", ["absl.flags", "torch", "numpy"]))


def words_of_code(tree):
    """(line, text) of names and of strings, docstrings left out."""
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef))
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "arg"):
            if isinstance(text := getattr(node, field, None), str):
                yield node.lineno, text


def test_kinds_are_named_in_their_own_files_and_the_weight_tables_only():
    """Other code reads the record of a kind: see `models/block.py`."""
    from rwkv_jax.models import KINDS

    own = {f"models/{name}.py" for name in ("kinds", *KINDS)}
    own |= {f"interop/{name}.py" for name in ("official", "huggingface", "fla", "rwkv_cpp")}
    name, wrong = re.compile(rf"\b({'|'.join(KINDS)})\b"), []
    for path in SOURCES:
        if path.is_relative_to(ROOT / "rwkv_jax") and path.relative_to(ROOT / "rwkv_jax").as_posix() not in own:
            named = [(line, text) for line, text in words_of_code(TREES[path]) if name.search(text)]
            wrong += [f"{name_of(path)}:{line}: {text}" for line, text in named]
    assert not wrong, "\n".join(wrong)


def test_tests_mirror_the_folders_of_the_package():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS} - {".", "goldens", "experiments"}
    missing = sorted(folder for folder in folders if not (ROOT / "rwkv_jax" / folder).is_dir())
    assert not missing, f"folders of tests without one in rwkv_jax: {missing}"


def test_tests_have_unique_file_names():
    """pytest imports each test file under its basename."""
    names = collections.Counter(path.name for path in TESTS if path.name != "conftest.py")
    assert names.most_common(1)[0][1] == 1, names.most_common(1)


def test_tests_that_pages_and_sources_name_exist():
    files, named = {path.name: path for path in TESTS}, 0
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md", *SOURCES]
    for page in pages:
        for path, test in re.findall(r"\b((?:tests/)?[\w/]*test_\w+\.py)(?:::(\w+))?", page.read_text()):
            file = ROOT / path if path.startswith("tests/") else files.get(path, ROOT / path)
            assert file.is_file(), f"{name_of(page)} names {path}"
            assert not test or f"def {test}(" in file.read_text(), f"{name_of(page)} names {path}::{test}"
            named += 1
    assert named > 5


def test_package_import_loads_the_standard_library_alone():
    program = "import sys; before = set(sys.modules); import rwkv_jax; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for name in run.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names} == {"rwkv_jax"}


def test_package_provides_every_name_of_its_contents():
    import rwkv_jax

    names = {name: getattr(rwkv_jax, name).__name__ for name in dir(rwkv_jax)}
    assert {"build", "load", "save", "generate", "stream"} <= names.keys()
    assert names["build"] == "build" and names["ops"] == "rwkv_jax.ops"


def test_package_raises_attribute_error_for_an_unknown_name():
    import rwkv_jax

    with pytest.raises(AttributeError, match="module 'rwkv_jax' has no attribute 'biuld'"):
        _ = rwkv_jax.biuld
