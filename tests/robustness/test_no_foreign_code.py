"""No pickle is loaded and no foreign code runs: by reading our sources, and by planting some."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.support import parents

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for room in ("v4surgery", "scripts", "benchmarks", "examples")
    for path in (ROOT / room).rglob("*.py")
)
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "imp",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "importlib.import_module"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"),
    *("subprocess.check_call", "numpy.load", "np.load", "jinja2.Template", "jinja2.Environment"),
}
KEYWORDS = {"trust_remote_code", "shell", "allow_pickle", "weights_only"}
# Each with the reason why it is none of the above.
ALLOWED = {
    ("v4surgery/__init__.py", "importlib.import_module"): "its own modules, by a fixed table",
    ("v4surgery/slicers/lineage.py", "yaml.load"): "with a SafeLoader that takes no aliases",
    ("v4surgery/checkpoint/hub_http.py", "importlib.import_module"): "httpx or httpx2, by name",
    ("v4surgery/kernels/check.py", "importlib.import_module"): "its own modules, by a fixed table",
    ("v4surgery/kernels/dispatch.py", "importlib.import_module"): "its own modules, by a table",
    ("v4surgery/validation/report.py", "jinja2.Environment"): "our own template, autoescaped",
    ("benchmarks/slice_throughput.py", "subprocess.run"): "itself, as a process of its own",
    ("benchmarks/hub_reads.py", "subprocess.Popen"): "itself, as a process of its own",
    ("benchmarks/distributed.py", "subprocess.run"): "itself, through torchrun",
    ("examples/train_parent/corpus.py", "subprocess.run"): "pip download of pinned wheels",
    ("scripts/audit_dependencies.py", "subprocess.run"): "pip check, fixed words",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(tree: ast.AST) -> Iterator[str]:
    """What could load a pickle or run foreign code: modules, calls, keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module.split(".")[0] in MODULES:
                yield node.module
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if name in CALLS)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in CALLS:
                yield dotted(node.func)
            yield from (word.arg for word in node.keywords if word.arg in KEYWORDS)


def test_no_source_loads_pickles_or_runs_foreign_code() -> None:
    assert len(SOURCES) > 200
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in SOURCES
        for name in findings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set()  # no leave for what is no longer there


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import yaml\nyaml.load('x', Loader=None)", "yaml.load"),
        ("from yaml import unsafe_load", "yaml.unsafe_load"),
        ("AutoModel.from_pretrained('x', trust_remote_code=True)", "trust_remote_code"),
        ("eval('1')", "eval"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell"),
    ],
)
def test_the_check_finds_what_it_looks_for(source: str, name: str) -> None:
    assert name in set(findings(ast.parse(source)))


class Planted:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.trace,))  # type: ignore[return-value]


@pytest.fixture
def booby_trapped(small_parent: Path, tmp_path: Path) -> Path:
    """A parent with everything beside it that others would run."""
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').close()\n"
    for name in ("modeling_deepseek.py", "configuration_deepseek.py", "conftest.py", "setup.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Planted(trace)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV4ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_nothing_beside_the_weights_is_run(booby_trapped: Path, tmp_path: Path, v4: Run) -> None:
    out = tmp_path / "replica"
    recipe = tmp_path / "half.yaml"
    recipe.write_text("name: half\nkeep: {experts: 2}\n")
    for args in (
        ("inspect", booby_trapped),
        ("slice", "-r", recipe, "-p", booby_trapped, "-o", out),
        ("verify", out, "--parent", booby_trapped),
        ("validate", out, "--parent", booby_trapped),
        ("convert", booby_trapped, tmp_path / "bf16", "--to", "bf16"),
        ("trace", booby_trapped, "--ids", "1,2,3", "--out", tmp_path / "trace"),
        ("generate", booby_trapped, "--ids", "1,2,3", "--max-new-tokens", "2"),
    ):
        done = v4(*args)
        assert done.code == 0, done
    assert not (tmp_path / "ran").exists()
    for folder in (out, tmp_path / "bf16"):
        assert not [path for path in folder.iterdir() if path.suffix in (".py", ".bin", ".pt")]
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_pickle_in_place_of_any_file_is_refused(
    small_parent: Path, tmp_path: Path, v4: Run
) -> None:
    trace = tmp_path / "ran"
    planted = tmp_path / "planted.safetensors"
    planted.write_bytes(pickle.dumps(Planted(trace)))
    recipe = tmp_path / "by.yaml"
    recipe.write_text("name: by\nkeep: {experts: {keep: 2, by: reap}}\n")
    for args in (
        ("plan", "-r", recipe, "-p", small_parent, "--scores", planted),
        ("diff", planted, planted),
        ("plan", "-r", planted, "-p", small_parent),
    ):
        done = v4(*args)
        assert done.code in (1, 2) and done.err.startswith("error: ")
        assert "unexpected" not in done.err
    assert not trace.exists()
