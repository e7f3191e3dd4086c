"""The house stands as it is described: what is shipped, what imports what, what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom inside bnfold: a layer may import itself and those before it.
LAYERS = (
    ("errors", "rounding", "protobuf_wire", "layout"),
    ("range_guard",),
    ("affine",),
    ("channel_graph",),
    ("index_maps", "stating", "found", "kernels", "quantised"),
    ("planning",),
    ("passes",),
    ("folding",),
    ("merged",),
    ("report.model",),
    ("onnx_", "torch_"),
    ("simplify", "verify"),
    ("report", "progress"),
    ("rollback", "latency"),
    ("api",),
    ("testing", "ci", "cli_options"),
    ("cli_output",),
    ("cli_bench",),
    ("cli", "pre_commit", "pytest_plugin"),
)


def modules() -> dict[str, Path]:
    found = {f"bnfold.{path.stem}": path for path in (ROOT / "bnfold").glob("*.py")}
    for folder in ("verify", "report"):
        paths = (ROOT / "bnfold" / folder).glob("*.py")
        found |= {f"bnfold.{folder}.{path.stem}": path for path in paths}
    return found | {f"bnfold.passes.{path.stem}": path for path in (ROOT / "passes").glob("*.py")}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(module: str) -> int:
    inner = module.removeprefix("bnfold.")
    for level, names in enumerate(LAYERS):
        begins = tuple(name if name.endswith("_") else f"{name}." for name in names)
        if inner in names or inner.startswith(begins):
            return level
    return len(LAYERS)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, path in modules().items()
        if module != "bnfold.__init__"
        for other in imports(path)
        if other.startswith("bnfold.") and layer(other) > layer(module)
    ]
    assert not wrong


def test_passes_and_reports_know_no_framework() -> None:
    for module, path in modules().items():
        if module.startswith(("bnfold.passes", "bnfold.report.model", "bnfold.planning")):
            assert not {name.split(".")[0] for name in imports(path)} & {"onnx", "onnx_ir", "torch"}


def test_front_ends_do_not_know_each_other() -> None:
    of_torch = ("torch", "bnfold.torch_", "bnfold.verify.torch_")
    of_onnx = ("onnx", "onnx_ir", "onnxruntime", "bnfold.onnx_", "bnfold.verify.onnx_")
    foreign = {
        "bnfold.onnx_": of_torch,
        "bnfold.verify.onnx_": of_torch,
        "bnfold.torch_": of_onnx,
        "bnfold.verify.torch_": of_onnx,
    }
    for module, path in modules().items():
        for front, others in foreign.items():
            if module.startswith(front):
                met = {n for n in imports(path) for o in others if is_of(n, o)}
                assert not met, f"{module} imports {met}"


def is_of(name: str, package: str) -> bool:
    if package.endswith("_"):
        return name.startswith(package)
    return name == package or name.startswith(f"{package}.")


def test_the_core_knows_no_torch() -> None:
    known = ("bnfold.torch_", "bnfold.verify.torch_", "bnfold.api", "bnfold.__init__")
    for module, path in modules().items():
        if not module.startswith(known):
            assert not {name for name in imports(path) if name.split(".")[0] == "torch"}, module


def test_nothing_imports_the_folder_passes_under_its_own_name() -> None:
    for path in ROOT.glob("*/**/*.py"):
        if ".venv" not in path.parts:
            assert not any(name.split(".")[0] == "passes" for name in imports(path)), path


def test_the_checkout_links_passes_into_the_package() -> None:
    link = ROOT / "bnfold" / "passes"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "passes"


@pytest.mark.parametrize("statement", ["import bnfold", "import bnfold.cli"])
def test_importing_loads_no_heavy_package(statement: str) -> None:
    heavy = {"torch", "onnxruntime", "onnx", "onnx_ir", "onnxsim"}
    code = f"{statement}; import sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_folding_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, bnfold; bnfold.explain('models/digits_resnet.onnx');"
        "print(sorted({'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


SHIPPED = (
    "bnfold/py.typed", "bnfold/passes/local.py", "bnfold/verify/check.py",
    "bnfold/report/schema.json", "bnfold/report/html_page.css", "bnfold/report/html_page.js",
)  # fmt: skip


def test_the_wheel_ships_bnfold_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--wheel-dir", str(tmp_path), str(ROOT)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"bnfold"}
    assert set(SHIPPED) <= set(names)
