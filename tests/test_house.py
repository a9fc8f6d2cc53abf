"""The house rules that a test can hold: what remote code may contain, where tests lie, which versions are allowed."""

import ast
import doctest
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_imports

import hivilt
from tiny import CODE

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]

# Whoever loads a checkpoint runs these files: they compute, and leave the network, files and processes to transformers.
LIBRARIES = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
UNSAFE_MODULES = {
    *("pickle", "marshal", "shelve", "dbm"),
    *("subprocess", "multiprocessing", "pty", "ctypes", "importlib", "runpy", "code", "codeop"),
    *("socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "asyncio", "webbrowser"),
}
UNSAFE_NAMES = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)"
    r"|os\.(system|popen|startfile|(fork|exec|spawn|posix_spawn)\w*)"
    r"|torch\.(load|hub)\b.*"
    r"|.*\b(hf_hub_download|snapshot_download|cached_file|HfApi)"
)


def imported(tree: ast.Module) -> list[tuple[int, str]]:
    """Every import of a module, however deep, as (level, module): `from .x import y` is (1, "x")."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def names(tree: ast.Module) -> set[str]:
    """Every name that a module uses, dotted as it stands: `os`, `os.system`; `from os import system` gives the same."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def pins(name: str) -> dict[str, Version]:
    """The versions that a constraints file names."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras too, but for hivilt's own."""
    project = PYPROJECT["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    return [Requirement(line) for line in lines if not line.startswith("hivilt")]


@pytest.fixture(params=CODE)
def remote(request) -> Path:
    return ROOT / request.param


@pytest.fixture
def tree(remote) -> ast.Module:
    return ast.parse(remote.read_text(encoding="utf-8"))


@pytest.mark.checklist("14")
def test_loader_sees_the_imports_that_python_sees(remote, tree):
    # The loader reads text, not syntax: it misses `from . import x`, and takes a docstring's "from .x import" for code.
    relative = {(level, module) for level, module in imported(tree) if level}
    assert relative == {(1, module) for module in get_relative_imports(remote)}
    assert {f"{module}.py" for _, module in relative} <= set(CODE)
    assert all((ROOT / f"{module}.py").is_file() for _, module in relative)


@pytest.mark.checklist("14")
def test_remote_code_imports_only_its_libraries(tree):
    # Each one becomes a requirement of everybody who loads a checkpoint, even when imported inside a function.
    tops = {module.split(".")[0] for level, module in imported(tree) if level == 0}
    assert tops <= LIBRARIES | (sys.stdlib_module_names - UNSAFE_MODULES)


@pytest.mark.checklist("14")
def test_remote_code_neither_downloads_nor_unpickles_nor_runs_text(tree):
    assert not [name for name in names(tree) if UNSAFE_NAMES.fullmatch(name)]


# What reads, writes or removes files, by the last part of its name. `from_pretrained` and `save_pretrained` are not here:
# they are transformers' own and keep to the folder that they are given.
FILE_ACCESS = {
    *("open", "fdopen", "mmap", "memmap", "fromfile", "tofile", "loadtxt", "load", "save", "savez"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "touch", "mkdir", "makedirs"),
    *("unlink", "remove", "rmdir", "rmtree", "rename", "copy", "copyfile", "copytree", "move", "link", "symlink"),
    *("symlink_to", "hardlink_to", "load_file", "save_file", "safe_open"),
    *("iterdir", "glob", "rglob", "walk", "listdir", "scandir"),
}
# Who may: the image that the caller names, and the weights of an earlier save in the folder that the caller saves to.
MAY_ACCESS_FILES = {("load_image", "Image.open"), ("_remove_stale_weights", "index.read_text")}
MAY_ACCESS_FILES |= {("_as_seen", "image.load"), ("_remove_stale_weights", "stale.unlink")}


def file_access(tree: ast.AST) -> set[str]:
    """The calls below a node that touch files, dotted as they stand."""
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {name for name in called if name.split(".")[-1] in FILE_ACCESS}


@pytest.mark.checklist("14")
def test_remote_code_touches_no_file_but_what_the_caller_names(tree):
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {(function.name, name) for function in functions for name in file_access(function)} <= MAY_ACCESS_FILES
    # A line outside of functions would run at import, before anyone names a file.
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [ast.unparse(node) for node in outside if file_access(node)]


@pytest.mark.checklist("14")
def test_remote_code_never_asks_for_the_config_class(tree):
    # A local checkpoint loads configuration_hivilt.py twice, under two names, so that isinstance answers False.
    assert not [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "issubclass")
        and "HiViLTConfig" in ast.unparse(node.args[1])
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_has_its_tests(package):
    folder = Path(*package.split(".")[1:])
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert {f"test_{name}" for name in files} <= {path.name for path in (ROOT / "tests" / folder).glob("*.py")}


EXAMPLES = [
    path for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")) if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.parent.name != "tests"], ids=lambda path: path.stem)
def test_examples_in_docstrings_give_what_they_show(path):
    name = ".".join(["hivilt", *path.relative_to(ROOT).with_suffix("").parts])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"hivilt"} | {f"hivilt.{folder}" for folder in folders} == set(PACKAGES)


def test_every_item_of_the_acceptance_checklist_has_a_test():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Acceptance checklist")[1].split("\n## ")[0]
    items = set(re.findall(r"^(\d+)\. ", text, re.MULTILINE))
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert items == {item for file in files for item in re.findall(r'mark\.checklist\("(\d+)"\)', file)}


def test_nothing_in_the_root_hides_a_library():
    # A script's own folder comes first on sys.path; a folder called hivilt there hides the installed package.
    mine = {canonicalize_name(path.name.removesuffix(".py")) for path in ROOT.iterdir()}
    assert not mine & {"hivilt", *pins("constraints.txt")}


@pytest.mark.parametrize("requirement", [r for r in requirements() if r.specifier], ids=lambda r: r.name)
def test_lower_bound_is_the_version_that_make_versions_tries(requirement):
    name = canonicalize_name(requirement.name)
    (floor,) = (Version(bound.version) for bound in requirement.specifier if bound.operator == ">=")
    assert pins("constraints-floor.txt")[name] == floor
    assert pins("constraints.txt")[name] in requirement.specifier


def test_remote_code_refuses_what_pyproject_does_not_allow():
    code = (ROOT / "configuration_hivilt.py").read_text(encoding="utf-8")
    (line,) = (line for line in code.splitlines() if line.startswith("for _requirement in "))
    refused = {r.name: r.specifier for r in map(Requirement, ast.literal_eval(line.split(" in ")[1].rstrip(":")))}
    assert refused == {r.name: r.specifier for r in requirements() if r.name in ("transformers", "huggingface_hub")}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt"])
def test_pins_name_no_build(name):
    # `torch==2.13.0+cpu` installs only where that very build is at hand.
    assert not [package for package, version in pins(name).items() if version.local]


def test_version_is_the_same_in_both_places():
    assert hivilt.__version__ == PYPROJECT["project"]["version"]
