"""No file of the library reads code from data: what the linter's S rules check, and what they let pass."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for folder in ("l2g_meta", "examples", "docs", ".ci") for p in (ROOT / folder).rglob("*.py"))
NEVER = {
    "extractall", "extract", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "eval",
    "exec", "compile", "joblib.load", "marshal.loads", "shelve.open", "os.system", "os.popen", "tempfile.mktemp",
    "urllib.request.urlopen", "urllib.request.urlretrieve", "__import__",
}  # fmt: skip
NEEDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}


# Files are written by l2g_meta.files.writing alone. These have reasons of their own: memory maps, downloads, a switch
# of the Linux kernel.
WRITERS = {"files/writing.py", "data/cache.py", "data/download.py", "bench/comparison.py"}
WRITES = {"write_text", "write_bytes", "savefig", "to_csv", "tofile", "open_memmap", "touch"}


def written(source: str) -> Iterator[str]:
    """What a source calls that writes a file by its name."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call):
            name = ast.unparse(call.func)
            texts = [a.value for a in (*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode"))
                     if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip
            opens = name in ("open", "os.fdopen", "io.open", "gzip.open") and any(set(t) & set("wax+") for t in texts)
            to_nowhere = call.args and ast.unparse(call.args[0]) == "os.devnull"
            if (opens and not to_nowhere) or ("." in name and name.rpartition(".")[2] in WRITES):
                yield f"{call.lineno}: {name}"


def broken(source: str) -> Iterator[str]:
    """What a source calls that it must not."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).replace("numpy.", "np.")
        last = name.rpartition(".")[2]
        arguments = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if name in NEVER or ("." in name and last in ("extractall", "extract")):
            yield f"{call.lineno}: {name}"
        for function, (argument, value) in NEEDS.items():
            if name == function and arguments.get(argument) is not value:
                yield f"{call.lineno}: {name} without {argument}={value}"
        if arguments.get("shell") is True or arguments.get("verify") is False:
            yield f"{call.lineno}: {name} with shell=True or verify=False"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rules(path: Path) -> None:
    assert list(broken(path.read_text(encoding="utf-8"))) == []


def test_one_way_to_write() -> None:
    package = ROOT / "l2g_meta"
    found = {path: list(written(path.read_text(encoding="utf-8"))) for path in package.rglob("*.py")}
    others = {str(path.relative_to(package)): calls for path, calls in found.items() if calls}
    allowed = [c for c in others.get("training/curves.py", []) if c.endswith("figure.savefig")]  # into an open file
    rest = {name: calls for name, calls in others.items() if name not in WRITERS}
    assert "files/writing.py" in others and rest == {"training/curves.py": allowed}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=w)", "tar.extractall(d)",
        "tar.extract(m)", "pickle.load(f)", "pickle.loads(b)", "yaml.load(f)", "eval('1')", "exec('x')",
        "np.load(f)", "numpy.load(f, allow_pickle=True)", "run('ls', shell=True)", "requests.get(u, verify=False)",
    ],
)  # fmt: skip
def test_the_rules_bite(source: str) -> None:
    assert list(broken(source))


def test_what_is_allowed() -> None:
    assert not list(
        broken("model.eval(); torch.load(f, weights_only=True); np.load(f, allow_pickle=False); re.match(p, s)")
    )
    assert len(FILES) > 50
