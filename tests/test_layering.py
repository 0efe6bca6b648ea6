"""Who may import whom, read from the source: a table, so that the next import that crosses it is a decision."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "prefpipe"

# The lower a layer, the fewer it may know. A name stands for its submodules too, unless they are named themselves.
LAYERS: list[set[str]] = [
    {"", "errors", "records", "components", "settings", "logps", "answers", "statistics", "logs", "processes"}
    | {"progress", "files", "provenance", "calculator", "annotations", "verdicts", "citations", "words", "torchrun"}
    | {"launch.notice", "kept"},
    {"losses", "pairers", "generators", "tasks", "sources", "prompts", "artifacts", "models", "tracking", "tiny_model"}
    | {"grouping", "api", "reward_models", "sharding", "vllm_engine", "documents", "equivalence", "memory", "ladder"},
    {"training", "sampling"},
    {"scorers", "scoring_models", "pair_rankers", "judging"},
    {"stages", "rounds", "report", "launch", "trials"},
    {
        "launch.sweep",
        "launch.slurm",
        "config",
        "suggest",
        "check",
        "run",
        "plan",
        "recorder",
        "search",
        "search_space",
        "cli",
        "worker",
        "training.worker",
        "__main__",
    },
]
DOOR = LAYERS[-1]
KINDS = ["losses", "pairers", "generators", "scorers", "tasks"]

HEAVY = {"torch", "transformers", "vllm", "deepspeed", "mlflow", "accelerate", "datasets", "matplotlib", "wandb"}
HEAVY |= {"optuna", "bitsandbytes"}
MAY_BE_HEAVY = {"training", "models", "tiny_model", "report.figures", "scoring_models", "pair_rankers"}
MAY_BE_HEAVY |= {"vllm_engine.calculator"}


class Import(NamedTuple):
    module: str
    imported: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.module} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Dotted name inside the package, "" for the package itself → file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(module: str, path: Path) -> Iterator[Import]:
    """Everything that a module imports when it runs; what stands under TYPE_CHECKING is for readers only."""

    def walk(node: ast.AST, *, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("prefpipe.") in MODULES
                yield Import(module, inner if is_module else str(node.module), at_top)
        else:
            only_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in node.orelse if only_types and isinstance(node, ast.If) else ast.iter_child_nodes(node):
                yield from walk(child, at_top=at_top and not inside)

    yield from walk(ast.parse(path.read_text()), at_top=True)


MODULES = modules()
IMPORTS = [found for module, path in MODULES.items() for found in imports(module, path)]
INSIDE = [found for found in IMPORTS if found.imported.partition(".")[0] == "prefpipe"]


def covered(module: str, names: set[str]) -> str | None:
    """The longest of the names that stands for a module."""
    matches = [name for name in names if module == name or (name and module.startswith(name + "."))]
    return max(matches, key=len) if matches else None


def layer(module: str) -> int:
    """The number of a module's layer."""
    name = covered(module, set().union(*LAYERS))
    assert name is not None, f"{module} stands in no layer; add it to LAYERS"
    return next(number for number, names in enumerate(LAYERS) if name in names)


def name_inside(found: Import) -> str:
    return found.imported.removeprefix("prefpipe").removeprefix(".")


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if covered(module, set().union(*LAYERS)) is None] == []


def test_nothing_imports_upwards() -> None:
    assert [str(found) for found in INSIDE if layer(name_inside(found)) > layer(found.module)] == []


def test_components_do_not_import_each_other_sideways() -> None:
    pairs = [(covered(f.module, set(KINDS)), covered(name_inside(f), set(KINDS)), f) for f in INSIDE]
    assert [str(found) for here, there, found in pairs if here and there and here != there] == []


def test_one_component_does_not_import_another_of_its_kind() -> None:
    """Their common base is none."""
    siblings = [f for f in INSIDE if covered(f.module, set(KINDS)) == covered(name_inside(f), set(KINDS)) is not None]
    siblings = [f for f in siblings if name_inside(f) not in ("losses.base", "pairers.base")]
    assert [str(found) for found in siblings if found.module.count(".") and name_inside(found).count(".")] == []


@pytest.mark.parametrize("package", ["hydra", "omegaconf"])
def test_only_the_door_knows_hydra(package: str) -> None:
    users = {found.module for found in IMPORTS if found.imported.partition(".")[0] == package}
    assert users <= DOOR


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    early = [found for found in IMPORTS if found.at_top and found.imported.partition(".")[0] in HEAVY]
    assert [str(found) for found in early if covered(found.module, MAY_BE_HEAVY) is None] == []


def test_no_heavy_package_is_reachable_from_the_command_line() -> None:
    """At import time, from cli and run, and from the component modules, which are found by looking in their folders."""
    reached: set[str] = set()
    open_ = ["cli", "run", *(module for module in MODULES if covered(module, {*KINDS}))]
    while open_:
        module = open_.pop()
        if module not in reached:
            reached.add(module)
            open_ += [name_inside(found) for found in INSIDE if found.module == module and found.at_top]
            open_.append(module.rpartition(".")[0])
    early = [found for found in IMPORTS if found.at_top and found.imported.partition(".")[0] in HEAVY | {"numpy"}]
    assert [str(found) for found in early if found.module in reached] == []


def test_nothing_builds_what_a_config_names() -> None:
    text = {module: path.read_text() for module, path in MODULES.items()}
    assert [module for module, source in text.items() if "instantiate(" in source] == []
