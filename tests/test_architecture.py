"""The import rules of the house, read from the syntax trees: who may import whom, and what nobody may do."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "cascade").rglob("*.py")])

BRIDGE = "app.engine.runner"  # the one module of the server that knows tensors

# Layers from the top down. A module imports its own layer and lower ones, never a higher one.
APP_LAYERS = (
    ("app.cli", "app.cli_*"),
    ("app.main",),
    ("app.api",),
    # Modules of jobs that talk to engines stand above them, those that keep jobs below.
    tuple(
        f"app.jobs.{module}"
        for module in (
            *("dispatcher", "maintenance", "fleet", "flights", "forecast", "results"),
            *("links", "pictures", "supervisor"),
        )
    ),
    ("app.engine",),
    ("app.jobs", "app.storage"),
    ("app.outbound",),
    ("app.schemas", "app.errors", "app.settings", "app.api_keys", "app.logs", "app.metrics", "app.clock"),
)
CASCADE_LAYERS = (
    ("cascade.evaluation",),
    ("cascade.training",),
    ("cascade.pipeline",),
    ("cascade.tasks",),
    ("cascade.checkpoints", "cascade.lora"),
    ("cascade.acceleration", "cascade.cpu", "cascade.devices", "cascade.marks", "cascade.recent"),
    ("cascade.models",),
    ("cascade.conditioning", "cascade.prompts", "cascade.sampling", "cascade.sizes"),
    ("cascade.networks",),
    ("cascade.config",),
    ("cascade.errors",),
)


class Import(NamedTuple):
    """One imported module: where it stands and whether it is imported when the file is."""

    name: str
    line: int
    is_lazy: bool


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a file, with relative ones resolved and `from package import module` as that module."""
    lazy = {id(node) for outer in ast.walk(tree) if _is_function(outer) for node in ast.walk(outer)}
    lazy |= {id(node) for outer in ast.walk(tree) if _is_type_checking(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _resolved(node, module, is_package)
            for alias in node.names:
                name = f"{source}.{alias.name}" if _is_ours(f"{source}.{alias.name}") else source
                yield Import(name, node.lineno, id(node) in lazy)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _resolved(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _is_ours(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    for depth, packages in enumerate(layers):
        for package in packages:
            stem = package.removesuffix("*")
            if inside(name, package) or (stem != package and name.startswith(stem)):
                return depth
    return None


TREES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in SOURCES}
IMPORTS = {
    module_name(path): list(imports(TREES[module_name(path)], module_name(path), path.stem == "__init__"))
    for path in SOURCES
}


def offenders(modules: str, forbidden: tuple[str, ...], *, lazy_too: bool = True) -> list[str]:
    return [
        f"{module}:{found.line} imports {found.name}"
        for module, all_found in IMPORTS.items()
        if inside(module, modules)
        for found in all_found
        if (lazy_too or not found.is_lazy) and any(inside(found.name, name) for name in forbidden)
    ]


def test_the_trees_are_there() -> None:
    assert {"app.main", "app.cli", "cascade.config", BRIDGE} <= TREES.keys()
    assert offenders("cascade.networks", ("torch",)), "the reader of imports finds nothing at all"


def test_cascade_knows_nothing_of_the_server() -> None:
    assert offenders("cascade", ("app", "fastapi", "uvicorn", "starlette", "pydantic", "typer")) == []


def test_only_the_runner_reaches_tensors() -> None:
    reached = offenders("app", ("cascade", "torch", "numpy", "transformers", "safetensors"))
    assert [line for line in reached if not line.startswith((BRIDGE, "app.cli"))] == []


def test_the_command_line_imports_tensors_only_inside_commands() -> None:
    heavy = ("cascade", "torch", "numpy", "transformers", "fastapi", "uvicorn", "app.main", "app.engine")
    assert [line for line in offenders("app", heavy, lazy_too=False) if line.startswith("app.cli")] == []


def test_jobs_and_the_scheduler_run_without_torch() -> None:
    for package in ("app.jobs", "app.engine.scheduler", "app.storage", "app.api"):
        reached, ahead = {package}, [module for module in IMPORTS if inside(module, package)]
        while ahead:
            module = ahead.pop()
            found = [name.name for name in IMPORTS.get(module, []) if not name.is_lazy]
            assert not [name for name in found if inside(name, "torch")], (
                f"{package} reaches torch by {module}"
            )
            ahead += [name for name in found if name in IMPORTS and name not in reached]
            reached.update(found)


def test_sampling_takes_networks_as_callables() -> None:
    assert offenders("cascade.sampling", ("cascade.networks", "cascade.checkpoints", "transformers")) == []


@pytest.mark.parametrize("layers", [APP_LAYERS, CASCADE_LAYERS], ids=["app", "cascade"])
def test_lower_layers_never_import_higher_ones(layers: tuple[tuple[str, ...], ...]) -> None:
    upward = []
    for module, found in IMPORTS.items():
        own = layer(module, layers)
        for name in found:
            other = layer(name.name, layers)
            if own is not None and other is not None and other < own:
                upward.append(f"{module}:{name.line} imports {name.name}")
    assert upward == []


def test_every_module_has_its_place_in_the_layers() -> None:
    packages = ("app", "cascade", "cascade.__main__")
    lost = [
        name for name in TREES if name not in packages and layer(name, APP_LAYERS + CASCADE_LAYERS) is None
    ]
    assert lost == []


def test_only_settings_read_the_environment() -> None:
    readers = [
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node) in {"os.environ", "os.getenv", "environ"}
    ]
    assert set(readers) <= {"app.settings"}


def test_nobody_reads_or_writes_pickle() -> None:
    code_in_data = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    assert offenders("app", code_in_data) + offenders("cascade", code_in_data) == []
    calls = {"torch.load", "torch.save", "np.load", "numpy.load"}
    for module, tree in TREES.items():
        used = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not calls.intersection(used), f"{module} calls {calls.intersection(used)}"
        trusting = [node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        assert "trust_remote_code" not in trusting, module


# What no module may do while it is imported: read, write, start, choose a device, parse arguments, compute.
WORK = {
    *(
        "open",
        "print",
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "exists",
        "iterdir",
        "glob",
        "mkdir",
    ),
    *(
        "run",
        "start",
        "connect",
        "urlopen",
        "Thread",
        "Process",
        "Popen",
        "create_app",
        "Settings",
        "basicConfig",
    ),
    *(
        "from_pretrained",
        "load_file",
        "load_cascade",
        "is_available",
        "set_num_threads",
        "parse_args",
        "getenv",
    ),
    *("default_rng", "manual_seed", "uuid4", "token_bytes", "token_hex", "time", "now", "configure"),
}


def test_importing_a_module_starts_no_work() -> None:
    working = [
        f"{module}:{call.lineno} calls {ast.unparse(call.func)}"
        for module, tree in TREES.items()
        for call in _calls_at_import(tree)
        if _is_work(ast.unparse(call.func))
    ]
    assert working == []


def _is_work(name: str) -> bool:
    if name == "torch.device":  # a name, no device is touched
        return False
    return name.rsplit(".", 1)[-1] in WORK or name.startswith(("torch.", "np.random.", "random."))


def _calls_at_import(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls outside functions and decorators: those that run when the module is imported."""
    ahead: list[ast.AST] = list(tree.body)
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Call):
            yield node
        if _is_main_guard(node) or _is_function(node):
            continue
        decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
        ahead += [child for child in ast.iter_child_nodes(node) if child not in decorators]


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def test_the_search_for_work_finds_it() -> None:
    tree = ast.parse(
        "import torch\nZEROS = torch.zeros(3)\nclass A:\n    text = open('x').read()\ndef f(): open('y')"
    )
    assert sorted(
        ast.unparse(call.func) for call in _calls_at_import(tree) if _is_work(ast.unparse(call.func))
    ) == [
        "open",
        "torch.zeros",
    ]


# Modules that come with a declared package and are part of what it offers.
BROUGHT_ALONG = {"pydantic-core": "pydantic", "starlette": "fastapi", "typing-extensions": "pydantic"}


# By us, that is: SQLAlchemy imports them when a URL asks for them.
NEVER_IMPORTED = {"asyncpg", "greenlet"}


def test_every_dependency_is_declared_and_earns_its_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [entry for name, entries in extras.items() if name not in ("test", "dev") for entry in entries]
    entries = [*project["dependencies"], *optional]
    declared = {re.split(r"[<>=\[]", entry)[0] for entry in entries} - NEVER_IMPORTED
    homes = packages_distributions()
    imported = {found.name.split(".")[0] for all_found in IMPORTS.values() for found in all_found}
    foreign = imported - set(sys.stdlib_module_names) - {"app", "cascade"}
    used = {home.lower().replace("_", "-") for name in foreign for home in _homes(homes[name], declared)}
    assert {BROUGHT_ALONG.get(name, name) for name in used} == declared


def _homes(packages: list[str], declared: set[str]) -> list[str]:
    """Of the packages that share a namespace, those that are declared."""
    return [name for name in packages if name in declared] or packages[:1]
