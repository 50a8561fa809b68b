"""Rules that hold for the whole repository: packaging, imports, sizes, and what code may not do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = {
    "core": ROOT / "core",
    "speech": ROOT / "modalities" / "speech",
    "text": ROOT / "modalities" / "text",
    "vision": ROOT / "modalities" / "vision",
}
MOST_LINES = 400


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that belongs to the project: what git tracks or would add, or all of them outside a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".venv", "__pycache__"} & set(path.parts)]
    return tuple(sorted(path for path in paths if path.is_file()))


def python_files(*folders: str) -> list[Path]:
    inside = [ROOT / folder for folder in folders] or [ROOT]
    return [path for path in project_files() if path.suffix == ".py" and any(map(path.is_relative_to, inside))]


def source_files() -> list[Path]:
    return [path for path in python_files("core/src", "modalities") if "src" in path.relative_to(ROOT).parts]


def configuration(folder: Path) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_the_files_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in project_files()}
    assert {"pyproject.toml", "core/src/data2vec/core/settings/fields.py", "tests/test_architecture.py"} <= names


def test_data2vec_is_a_namespace() -> None:
    assert not [path for path in project_files() if path.parts[-2:] == ("data2vec", "__init__.py")]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_is_a_typed_package_of_its_own(member: str) -> None:
    folder = MEMBERS[member]
    settings = configuration(folder)
    package = folder / "src" / "data2vec" / member
    assert settings["project"]["name"] == f"data2vec-{member}"
    assert settings["tool"]["uv"]["build-backend"] == {"module-name": f"data2vec.{member}"}
    assert settings["build-system"]["build-backend"] == "uv_build"
    assert (package / "py.typed").is_file()
    assert (folder / settings["project"]["readme"]).is_file()
    assert [path.name for path in (folder / "src" / "data2vec").iterdir() if path.name != "__pycache__"] == [member]
    assert str(folder.relative_to(ROOT)) in configuration(ROOT)["tool"]["uv"]["workspace"]["members"]


def test_tools_know_every_member() -> None:
    tool = configuration(ROOT)["tool"]
    sources = {str((folder / "src").relative_to(ROOT)) for folder in MEMBERS.values()}
    assert set(tool["mypy"]["mypy_path"]) == {*sources, "tools", "experiments", "experiments/small"}
    assert set(tool["mypy"]["files"]) == {*(f"{source}/data2vec" for source in sources), "tools", "experiments"}
    tests = {str((folder / "tests").relative_to(ROOT)) for folder in MEMBERS.values()}
    assert set(tool["pytest"]["ini_options"]["testpaths"]) == {*tests, "tests"}
    listed = re.search(r"^MEMBERS=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert listed is not None
    assert set(listed[1].split()) == set(MEMBERS)


def test_versions_agree() -> None:
    versions = {folder.name: configuration(folder)["project"]["version"] for folder in (ROOT, *MEMBERS.values())}
    assert len(set(versions.values())) == 1, versions
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == versions["core"]


def test_files_stay_short() -> None:
    files = [*source_files(), *python_files("tools", "experiments")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_every_experiment_says_what_it_is() -> None:
    experiments = python_files("experiments")
    assert experiments
    docstrings = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in experiments}
    assert not [name for name, docstring in docstrings.items() if len(docstring or "") < 80]


def test_test_folders_are_no_packages() -> None:
    assert not [path for path in project_files() if path.parts[-2:] == ("tests", "__init__.py")]


def check_imports(folder: Path, *sources: Path) -> tuple[bool, str]:
    """Whether every contract of ``folder`` holds for the packages in ``sources``, and what was reported.

    -S leaves the installed packages of this workspace out: the parts of a namespace are searched in no fixed order.
    """
    program = "from importlinter.cli import lint_imports_command as run; run(['--no-cache', '--no-logo'])"
    search = [
        *map(str, sources),
        str(ROOT / "tools"),
        *dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")),
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return done.returncode == 0, done.stdout + done.stderr


def test_import_contracts_hold() -> None:
    holds, output = check_imports(ROOT, *(folder / "src" for folder in MEMBERS.values()))
    assert holds, output


def test_import_contracts_notice_a_breach(tmp_path: Path) -> None:
    """The contracts themselves, on a copy of the sources in which core imports what it may not."""
    for folder in MEMBERS.values():
        shutil.copytree(folder / "src", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "data2vec" / "core" / "errors.py").open("a") as file:
        file.write("\nimport data2vec.vision\nimport timm\nimport deepspeed\nimport omegaconf\n")
    with (tmp_path / "data2vec" / "core" / "run" / "load.py").open("a") as file:
        file.write("\nimport data2vec.core.pretraining.data2vec\n")
    holds, output = check_imports(tmp_path, tmp_path)
    assert not holds
    contracts = configuration(ROOT)["tool"]["importlinter"]["contracts"]
    broken = [contract["name"] for contract in contracts if f"{contract['name']} BROKEN" in output]
    kept = [contract["name"] for contract in contracts if contract["name"] not in broken]
    assert kept == ["vision needs no library of speech or text"], output


def test_shared_tools_name_no_modality() -> None:
    """They find what is installed; only benchmarks of images read images."""
    of_images = {ROOT / "tools" / "benchmarks" / name for name in ("loader.py", "masks.py")}
    named = re.compile(r"data2vec\.(?:speech|text|vision)\b")
    tools = [path for path in python_files("tools") if path not in of_images]
    code = {
        path.name: "\n".join(re.findall(r"^ *(?:from|import) .*", path.read_text(), re.MULTILINE)) for path in tools
    }
    assert len(code) > 10
    assert not [name for name, imports in code.items() if named.search(imports)]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_wheel_holds_the_package_and_nothing_else(member: str, tmp_path: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` names itself in UV
    assert uv, "the tests run under uv: uv run pytest"
    built = subprocess.run(
        [uv, "build", "--wheel", "--package", f"data2vec-{member}", "--out-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    version = configuration(ROOT)["project"]["version"]
    assert wheel.name == f"data2vec_{member}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (archive.read(name).decode() for name in inside if name.endswith("/METADATA"))
    source = MEMBERS[member] / "src"
    expected = {str(path.relative_to(source)) for path in project_files() if path.is_relative_to(source)}
    assert {name for name in inside if ".dist-info/" not in name} == expected
    assert f"data2vec/{member}/py.typed" in inside
    assert f"Version: {version}" in metadata
    assert "License-Expression: MIT" in metadata


def test_ci_runs_the_command_of_the_readme() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("pip install uv", "uv run experiments/vision_base.py", "uv run pytest"):
        assert command in readme
    assert re.search(r"^step_tests\(\) \{ uv run pytest; \}$", ci, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_package_registry_is_named() -> None:
    hosts = re.compile(rb"py[p]i\.org|pythonh[o]sted|download\.pyt[o]rch\.org|(?:extra-)?index-u[r]l")
    named = [path for path in project_files() if path != ROOT / "uv.lock" and hosts.search(path.read_bytes())]
    assert not named


FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "joblib.load", "dill.load", "dill.loads", "yaml.unsafe_load", "yaml.full_load", "shelve.open",
}  # fmt: skip


def forbidden_calls(code: str) -> list[str]:
    """Calls that could execute what they read, as ``line N: call``."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"line {node.lineno}: {name}" for name in names if name in FORBIDDEN_CALLS]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        constants = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        executes = (
            call in FORBIDDEN_CALLS
            or (call == "torch.load" and constants.get("weights_only") is not True)
            or constants.get("allow_pickle") is True
            or constants.get("shell") is True
        )
        if executes:
            found.append(f"line {node.lineno}: {call}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "import os\nos.system('ls')",
        "pickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_a_call_that_could_execute_its_input_is_noticed(code: str) -> None:
    assert forbidden_calls(code)


def test_nothing_that_is_read_is_executed() -> None:
    assert not forbidden_calls(
        "model.eval()\ntorch.load(path, weights_only=True)\nsubprocess.run(command, shell=False)"
    )
    # Tests may: they show that a trap that nobody springs would work.
    files = [path for path in python_files() if "tests" not in path.relative_to(ROOT).parts]
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): forbidden_calls(path.read_text()) for path in files}
    assert not {name: calls for name, calls in found.items() if calls}


INTERFACE = {  # each modality's own, under one name
    "MaskConfig", "MaskKind", "SpanMasker", "add_arguments", "length_of", "load_classifier", "load_encoder",
    "load_libsndfile", "load_tbb", "load_published", "load_transformers", "main", "our_name", "panels", "plan",
    "span_mask_reference", "student_state", "teacher_state", "transformers_state",
}  # fmt: skip


def test_a_name_means_one_thing() -> None:
    """No class or function of one module has the name of another's, but for what all modalities have."""
    defined: dict[str, set[str]] = {}
    for path in [*source_files(), *python_files("tools")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                defined.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))
    assert len(defined) > 500
    assert not {name: paths for name, paths in defined.items() if len(paths) > 1 and name not in INTERFACE}
