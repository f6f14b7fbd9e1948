"""The house: arrows point down, each heavy dependency has one home, and what needs no Lightning starts without it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = "lightning_ckmerge"
ROOT = Path(__file__).parents[1] / PACKAGE
MODULES = sorted(ROOT.rglob("*.py"))
ROWS = {
    "errors": 0,
    "checks": 1,
    "core": 2,
    "config": 3,
    "tensorfiles": 3,
    "search": 4,
    "buffer": 4,
    "distributed": 4,
    "pipeline": 5,
    "artifact": 5,
    "report": 6,
    "checkpoints": 6,
    "studies": 6,
    "plugin": 7,
    "cli": 8,
    "__init__": 8,
    "__main__": 9,
}
# Within the plugin, from the bottom: a run is paused, its ranks hold it, candidates are scored, results are published.
PLUGIN_ROWS = {
    "progress": 0,
    "clock": 0,
    "triggers": 0,
    "dirpath": 0,
    "restore": 1,
    "rank": 2,
    "evaluate": 3,
    "publish": 4,
    "strategies": 4,
    "plan": 5,
    "run": 6,
    "callback": 7,
    "offline": 8,
    "follow": 9,
    "ensemble": 9,
    "__init__": 9,
}
MAX_DOORS = 16
HOMES = {
    "fsspec": {"artifact"},
    "jinja2": {"report"},
    "jsonschema": {"artifact"},
    "lightning": {"plugin"},
    "markupsafe": {"report"},
    "matplotlib": {"report"},
    "numpy": {"buffer", "plugin", "report", "search", "studies"},
    "optuna": {"config", "report", "search", "studies"},
    "rich": {"cli"},
    "safetensors": {"buffer", "tensorfiles"},
    "scipy": {"search", "studies"},
    "torch": {
        "artifact",
        "buffer",
        "checkpoints",
        "cli",
        "core",
        "distributed",
        "plugin",
        "search",
        "studies",
        "tensorfiles",
    },
    "torchmetrics": {"plugin"},
    "transformers": {"cli"},
    "typer": {"cli"},
    "wandb": {"plugin"},
    "yaml": {"cli"},
}
# They read checkpoints of others: `torch.load(weights_only=True)`, and metadata by an unpickler with a list of classes.
RESTRICTED_READERS = {"checkpoints/distributed.py", "checkpoints/formats.py"}
# The one reader of others' JSON, schemas that come with the package, and a copy of what this process holds.
READERS_OF_JSON = {
    "tensorfiles/untrusted.py",
    "artifact/manifest.py",
    "artifact/ensembles.py",
    "plugin/rank/peft_adapters.py",
}
MAX_HOOK_LINES = 15

modules = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that imports below ``node`` name, in functions too, and under ``TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports must be absolute, so that arrows can be seen"
            assert child.module is not None
            # `from package import module` is an arrow to the module.
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imported(child)


def arrows() -> dict[str, set[str]]:
    """Return the modules that each module imports, by their dotted names."""
    paths = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    found = {name: set(imported(parse(path))) for name, path in paths.items()}
    return {
        name: {target if target in paths else target.rpartition(".")[0] for target in targets} & paths.keys() - {name}
        for name, targets in found.items()
    }


def test_no_module_is_reached_from_itself() -> None:
    graph = arrows()

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    assert [name for name in graph if name in reached(name)] == []


def test_every_room_has_a_row() -> None:
    assert {room_of(path) for path in MODULES} <= ROWS.keys()


@modules
def test_arrows_point_down(path: Path) -> None:
    room = room_of(path)
    for name in imported(parse(path)):
        package, _, rest = name.partition(".")
        if package == PACKAGE and rest != "__version__":
            other = rest.partition(".")[0]
            other = other if other in ROWS else "__init__"
            assert other == room or ROWS[other] < ROWS[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "plugin"], ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_between_the_plugins_rooms_point_down(path: Path) -> None:
    def room(parts: Sequence[str]) -> str:
        return parts[0] if parts else "__init__"

    own = room(path.relative_to(ROOT / "plugin").with_suffix("").parts)
    prefix = f"{PACKAGE}.plugin."
    for name in (n for n in imported(parse(path)) if n.startswith(prefix)):
        other = room(name.removeprefix(prefix).split("."))
        assert other == own or PLUGIN_ROWS[other] < PLUGIN_ROWS[own], f"{own} must not import {name}"


def test_no_room_has_too_many_doors() -> None:
    """About a dozen modules and rooms are as many as one remembers."""
    rooms = [p.parent for p in MODULES if p.name == "__init__.py"]
    entries = {room: [p for p in room.iterdir() if p in MODULES or p in rooms] for room in rooms}
    doors = {room.name: len([p for p in found if p.name != "__init__.py"]) for room, found in entries.items()}
    assert {room: num for room, num in doors.items() if num > MAX_DOORS} == {}


@modules
def test_what_is_imported_from_the_house_is_there(path: Path) -> None:
    """Imports within functions run late, and no linter follows them."""
    wanted = [
        n for n in ast.walk(parse(path)) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(PACKAGE)
    ]
    named = [(n.module or "", alias.name) for n in wanted for alias in n.names]
    assert [(module, name) for module, name in named if not defines(module, name)] == []


def defines(module: str, name: str) -> bool:
    base = ROOT.parent.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    below = base / f"{name}.py"
    return (
        below.is_file()
        or (base / name).is_dir()
        or re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) is not None
    )


@modules
def test_each_dependency_is_at_home_where_it_is_imported(path: Path) -> None:
    for name in imported(parse(path)):
        package = name.partition(".")[0]
        if package != PACKAGE and package not in sys.stdlib_module_names:
            assert room_of(path) in HOMES.get(package, set()), f"{package} has no home in {room_of(path)}"


@pytest.mark.parametrize("dynamic", ["import_module", "__import__"])
def test_nothing_is_imported_behind_this_tests_back(dynamic: str) -> None:
    """Lightning's loops come from the Trainer's own package, and public names are loaded lazily."""
    users = {p.relative_to(ROOT).as_posix() for p in MODULES if dynamic in p.read_text(encoding="utf-8")}
    assert {room_of(ROOT / user) for user in users} <= {"__init__", "plugin"}


def test_what_needs_no_trainer_starts_without_lightning() -> None:
    paths = [p.relative_to(ROOT.parent).with_suffix("") for p in (ROOT / "core").rglob("*.py")]
    names = [PACKAGE, f"{PACKAGE}.config", *(".".join(p.parts).removesuffix(".__init__") for p in paths)]
    heavy = sorted(HOMES.keys() - {"torch", "numpy"})
    program = (
        f"import importlib, sys\n[importlib.import_module(n) for n in {names}]\n"
        f"print([n for n in {[*heavy, 'pytorch_lightning']} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_itself_starts_without_torch() -> None:
    program = f"import sys, {PACKAGE}, {PACKAGE}.config\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_hooks_fit_on_a_few_lines() -> None:
    (callback,) = [n for n in parse(ROOT / "plugin" / "callback.py").body if isinstance(n, ast.ClassDef)]
    functions = [n for n in callback.body if isinstance(n, ast.FunctionDef)]
    named = ("setup", "teardown", "state_dict", "load_state_dict")
    hooks = [f for f in functions if f.name.startswith("on_") or f.name in named]
    assert {"setup", "on_train_batch_end", "on_train_end", "state_dict"} <= {h.name for h in hooks}
    for hook in hooks:
        assert hook.end_lineno is not None
        assert hook.end_lineno - hook.lineno < MAX_HOOK_LINES, f"{hook.name} is too long: hooks say when, not what"


def public_things(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_things(node.body)


@modules
def test_what_is_public_is_documented(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree)
    undocumented = [n.name for n in public_things(tree.body) if not ast.get_docstring(n)]
    assert undocumented == []


@modules
def test_nothing_is_printed(path: Path) -> None:
    """A library logs; only commands write to the terminal."""
    if room_of(path) != "cli":
        calls = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call)]
        assert "print" not in {c.func.id for c in calls if isinstance(c.func, ast.Name)}


@modules
def test_nothing_is_unpickled(path: Path) -> None:
    """Buffers and artifacts are safetensors and JSON."""
    names = set(imported(parse(path)))
    picklers = {n.partition(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    calls = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call)]
    loads = [ast.unparse(c) for c in calls if ast.unparse(c.func) in ("torch.load", "pickle.load", "pickle.loads")]
    if path.relative_to(ROOT).as_posix() in RESTRICTED_READERS:
        assert picklers == {"pickle"}
        assert all(load.startswith("torch.load(") and "weights_only=True" in load for load in loads)
    else:
        assert not picklers
        assert not loads


@modules
def test_nothing_that_a_file_brings_is_run(path: Path) -> None:
    """No ``eval``, no ``exec``, no ``compile``; YAML by ``safe_load`` alone; JSON and names by one reader."""
    calls = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call)]
    named = {ast.unparse(c.func) for c in calls}
    assert not named & {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "marshal.loads", "marshal.load"}
    assert not named & {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "pickle.Unpickler", "runpy.run_path"}
    if path.relative_to(ROOT).as_posix() not in READERS_OF_JSON:
        assert not named & {"json.load", "json.loads"}, "read it by `tensorfiles.untrusted`"
