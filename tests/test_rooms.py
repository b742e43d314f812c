"""Who may import whom: numbers know no Ray, questions know no torch, and the command answers at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "capture": {"ray", "duckdb", "cluster", "analysis", "vastai"},
    "cluster": {"duckdb", "analysis"},
    "analysis": {"torch", "transformers", "ray", "cluster", "vastai", "safetensors"},
}
# what of capture the others may know: nothing of the engine
LIGHT = {"schema", "layout", "manifest", "store", "config", "errors", "progress", "printable"}

FOLDERS = {"analysis", "capture", "cluster", "configs", "docs", "tests", ".ci"}  # all that the project has at its root


def test_nothing_else_lies_at_the_root():
    """A run directory that a trial left there came in with a commit once."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {path.split("/")[0] for path in listed.split("\0") if "/" in path} == FOLDERS


def imports(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_its_room_allows(package):
    for path in (ROOT / package).rglob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] not in FORBIDDEN[package], f"{path.relative_to(ROOT)} imports {module}"
            if package == "analysis" and module.startswith("capture."):
                assert module.split(".")[1] in LIGHT, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pairscope", ["torch", "ray", "duckdb", "pyarrow", "transformers", "yaml"]),
        ("capture.run", ["torch", "transformers"]),
        ("cluster.actor", ["torch", "transformers"]),
        ("analysis.cli", ["torch", "transformers", "ray"]),
    ],
)
def test_a_module_imports_without_the_heavy_libraries(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_answers_without_importing_a_verb():
    code = (
        "import sys; sys.argv = ['pairscope', '--help']\n"
        "import pairscope\n"
        "try: pairscope.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('ray', 'torch', 'duckdb', 'pyarrow', 'pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]")
