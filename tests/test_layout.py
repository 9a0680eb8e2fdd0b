"""The floors of the two packages: imports run downward only."""

import ast
from collections.abc import Container
from pathlib import Path

import pytest

import curvature

ROOT = Path(__file__).parent.parent
FLOORS = {
    "curvature": [
        {"arguments", "compilations", "errors", "nodes", "versions"},
        {"audit"},
        {
            "differentiable",
            "hooks",
            "nested",
            "losses",
            "module_calls",
            "objective",
            "origin",
            "allocation",
            "saved",
            "uncompiled",
        },
        {
            "contributions",
            "forward",
            "half_precision",
            "reevaluation",
            "side_effects",
            "trees",
        },
        {"along", "graph"},
        {"quadratic"},
        {
            "differences",
            "gradient",
            "reference",
            "rules.karatsuba",
            "rules.matmul",
            "rules.normalised",
            "rules.rule",
        },
        {"rules.families", "rules.local", "rules.precision"},
        {"rules.lstm_layer", "rules.table"},
        {
            "rules.attention",
            "rules.bilinear",
            "rules.choice",
            "rules.elementwise",
            "rules.gradient_of_norm",
            "rules.linear",
            "rules.loss",
            "rules.lstm",
            "rules.moments",
            "rules.normalisation",
            "rules.product",
            "rules.softmax",
            "rules.views",
        },
        {"rules.convolution"},
        {"rules"},
        {"cotangents", "extend", "pushforward"},
        {"sweep"},
        {"engines"},
        {"tape"},
        {"recorded", "fit"},
        {"directional", "hvp"},
        {"testing"},
    ],
    "optim": [
        {"ranges", "rate", "warn"},
        {
            "autocast",
            "called",
            "checked",
            "global_hooks",
            "inherited",
            "intercept",
            "loss_graph",
            "loss_scale",
            "ranks",
            "record",
            "sharded",
        },
        {"accumulated", "apart", "inner", "portable", "sinks", "snapshot", "trail", "weighed"},
        {"configuration", "grads", "groups", "penalty", "twins"},
        {"evaluation"},
        {"again", "energy"},
        {"trial"},
        {"line", "din", "memory", "preconditioned", "schedules"},
        {"consistent", "estimators.estimator", "from_origin", "linear_in_rate", "rules.rule"},
        {"direction"},
        {
            "estimators.exact",
            "estimators.gauss_newton",
            "estimators.gradient_differences",
            "estimators.probes",
            "estimators.secant",
            "rules.lipschitz",
            "rules.caution",
            "rules.slope",
        },
        {
            "rules.cautious",
            "rules.edge",
            "rules.lyapunov",
            "rules.newton",
            "rules.robbins_monro",
            "rules.trust",
        },
        {"estimators", "rules"},
        {"dinadam", "inna", "innaprop", "innaprop_momentum", "stepper"},
        {"ahead"},
        {"plots", "wrapper"},
        {"rescaled", "gen"},
        {"named"},
    ],
}


def imports(path: Path) -> set[str]:
    """The dotted names that it imports, of a module that it imports whole all: ``module.*``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {f"{alias.name}.*" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path, package: str) -> str:
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


def part_of(imported: str, package: str, files: Container[str]) -> str:
    """The file of the package that an import reaches; "" for the package itself."""
    inside = imported.removeprefix(package).removeprefix(".")
    while inside and inside not in files:
        inside = inside.rpartition(".")[0]
    return inside


@pytest.mark.parametrize("package", FLOORS)
def test_imports_run_downward(package: str) -> None:
    floor_of = {name: i for i, floor in enumerate(FLOORS[package]) for name in floor}
    files = {name_of(path, package): path for path in (ROOT / package).rglob("*.py")}
    del files[""]
    assert set(files) == set(floor_of)
    for name, path in files.items():
        for imported in imports(path):
            assert not imported.startswith("."), (name, imported)
            if imported.split(".")[0] == package:
                part = part_of(imported, package, floor_of)
                assert part, (name, imported)
                assert floor_of[part] < floor_of[name], (name, imported)


def test_curvature_knows_no_optimizer_and_optim_only_public_names() -> None:
    for path in (ROOT / "curvature").rglob("*.py"):
        for imported in imports(path):
            assert not f"{imported}.".startswith(("optim.", "torch.optim.")), (path.name, imported)
    public = {f"curvature.{name}" for name in curvature.__all__}
    for path in (ROOT / "optim").rglob("*.py"):
        for imported in imports(path):
            assert imported.split(".")[0] != "curvature" or imported in public, (
                path.name,
                imported,
            )
