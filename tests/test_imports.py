"""Imports go in one direction: down the layers, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "pallas_kernels": "pallas_kernels",
    "crcm_jax": "crcm_jax",
    "configs": "crcm_jax.configs",
    "convert": "crcm_jax.convert",
    "benchmarks": "benchmarks",
}
"""Folder → the name that its modules are imported by."""

LAYERS: tuple[tuple[str, ...], ...] = (
    ("pallas_kernels", "crcm_jax"),
    ("crcm_jax.errors", "crcm_jax.compiler", "crcm_jax.shapes", "crcm_jax.interrupts", "crcm_jax.ranges"),
    ("crcm_jax.chunks", "crcm_jax.flow", "crcm_jax.config_ranges"),
    ("crcm_jax.parallel",),
    ("crcm_jax.saving",),
    ("crcm_jax.cache",),
    ("crcm_jax.models.base", "crcm_jax.models.core"),
    ("crcm_jax.models",),
    ("crcm_jax.models.registry",),
    ("crcm_jax.sampling", "crcm_jax.configs", "crcm_jax.data"),
    ("crcm_jax.objectives",),
    ("crcm_jax.parts",),
    ("crcm_jax.recipes",),
    ("crcm_jax.pipeline", "crcm_jax.convert"),
    ("crcm_jax.evaluate", "crcm_jax.serve", "crcm_jax.numerics"),
    ("crcm_jax.train",),
    ("crcm_jax.aot",),
    ("crcm_jax.demo",),
    ("crcm_jax.cli",),
    ("crcm_jax.__main__",),
    ("benchmarks",),
)
"""From the ground up. A module stands in the layer of its longest prefix here, and imports of its own room and of rooms
that stand lower; rooms side by side do not import each other."""

UPWARD = {}
"""(module, what it imports from above): the reason."""

TREE: dict[str, ast.Module] = {}
for folder, name in FOLDERS.items():
    for path in sorted((ROOT / folder).rglob("*.py")):
        inner = path.relative_to(ROOT / folder)
        if any((ROOT / folder / parent).is_symlink() for parent in inner.parents):
            continue  # another folder of this table
        parts = [name, *inner.with_suffix("").parts]
        TREE[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))


def statements(node: ast.AST, loading: bool) -> Iterator[ast.stmt]:
    """Import statements below `node`; of those that run while it is loaded only, or of all of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (loading and later(child)):
            yield from statements(child, loading)


def later(node: ast.AST) -> bool:
    """Whether what stands in `node` does not run while the module is loaded."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imported(module: str, loading: bool = False) -> set[str]:
    """Names that a module imports; the module itself where the name is of something inside it."""
    found = set()
    for node in statements(TREE[module], loading):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{module} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in TREE else node.module for name in names}
    return found


def place(module: str) -> tuple[int, str]:
    """(layer, room) of a module."""
    rooms = [(i, room) for i, layer in enumerate(LAYERS) for room in layer if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=lambda found: len(found[1]))


def test_every_room_has_a_layer():
    known = {room for layer in LAYERS for room in layer}
    rooms = {".".join(module.split(".")[:2]) for module in TREE if module.startswith("crcm_jax.")}
    assert not rooms - known, "say in LAYERS what may import them"


@pytest.mark.parametrize("module", sorted(TREE))
def test_imports_go_down(module):
    layer, room = place(module)
    for name in sorted(imported(module) & set(TREE)):
        other, its_room = place(name)
        if its_room == room or (module, name) in UPWARD:
            continue
        assert other < layer, f"{module} imports {name}, which does not stand below it"


def test_the_exceptions_are_needed():
    for module, name in UPWARD:
        assert name in imported(module), f"{module} no longer imports {name}: take it off the list"


def test_no_circles_while_loading():
    def ancestors(name):
        return {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}

    # Loading a module loads the packages around it first; those of the importer are being loaded already.
    edges = {
        module: {near for name in imported(module, loading=True) for near in ancestors(name) & set(TREE)}
        - ancestors(module)
        for module in TREE
    }
    while leaves := {module for module, needs in edges.items() if not needs & set(edges)}:
        edges = {module: needs for module, needs in edges.items() if module not in leaves}
    # What is left imports something that is left; without those that nothing left imports, circles remain.
    while tops := set(edges) - {name for needs in edges.values() for name in needs}:
        edges = {module: needs for module, needs in edges.items() if module not in tops}
    assert not edges, f"these import each other: {', '.join(sorted(edges))}"


def test_what_is_installed_imports_nothing_that_is_not():
    for module in TREE:
        names = {name.split(".")[0] for name in imported(module)}
        assert not names & {"configs", "convert"}, f"{module}: the name is crcm_jax.configs, crcm_jax.convert"
        if not module.startswith("benchmarks"):
            assert not names & {"benchmarks", "tests"}, module
        if module.startswith("pallas_kernels"):
            assert "crcm_jax" not in names, module


def test_tests_and_examples_name_no_file_twice():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in statements(ast.parse(path.read_text()), loading=False):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {"configs", "convert"}, path
