"""The documentation is complete: the API reference has the public names, and each tutorial shows a script that runs."""

import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import l2g_meta
import l2g_meta.data
from l2g_meta.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
SCRIPTS = {"interop": ["learn2learn_protonet", "easyfsl_prototypical", "lightning_training"]}  # else that of its name

# Modules that are parts of others, not for use from outside. Each other one has something in docs/api.
COMMANDS = ("l2g_meta.cli", "l2g_meta.report.")  # they explain themselves: --help
INTERNAL = {
    "inner.compiled", "inner.scores",
    "bench.timing", "paper.equal_time", "classify.card", "classify.photo_folder", "data.images",
    "operators", "operators.norm_passes",
}  # fmt: skip


def documented() -> set[str]:
    """Full names that the directives of docs/api/*.rst give, listed members included."""
    names = set()
    for page in (DOCS / "api").glob("*.rst"):
        module = ""
        for block in re.split(r"^(?=\.\. )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if not (directive := re.match(r"\.\. (currentmodule|data|auto\w+):: (\S+)", block)):
                continue
            kind, name = directive.groups()
            if kind == "currentmodule":
                module = name
                continue
            full = name if name.startswith("l2g_meta.") else f"{module}.{name}"
            members = re.search(r":members:(.*(?:\n {4,}[^:\s].*)*)", block)
            listed = re.findall(r"\w+", members[1]) if members else []
            if kind == "automodule" and members and not listed:
                listed = own(importlib.import_module(full))
            names |= {full, *(f"{full}.{member}" for member in listed)}
    return names


def own(module: ModuleType) -> list[str]:
    """Public functions and classes that a module defines."""
    values = vars(module).items()
    return [n for n, v in values if n[0] != "_" and callable(v) and getattr(v, "__module__", "") == module.__name__]


def resolved(name: str) -> object:
    """What a dotted name stands for; ``None`` if for nothing."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def identity(value: object) -> str:
    """The full name under which a function or class was defined."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


@pytest.fixture(scope="module", name="reference")
def _reference() -> set[str]:
    return {identity(resolved(name)) for name in documented()}


def test_reference_names_only_what_exists():
    assert not [name for name in sorted(documented()) if resolved(name) is None]


@pytest.mark.parametrize("package", [l2g_meta, l2g_meta.data], ids=lambda package: package.__name__)
def test_reference_has_every_name_of_the_package(package, reference):
    public = {
        n: v for n, v in ((name, getattr(package, name)) for name in dir(package))
        if n[0] != "_" and getattr(v, "__module__", "").startswith("l2g_meta") and not inspect.ismodule(v)
        and not n.endswith("Error")
    }  # fmt: skip
    if package is l2g_meta:
        listed = re.findall(r"`(\w+)`", (DOCS / "api.md").read_text(encoding="utf-8").split("```")[0])
        assert set(listed) - {"l2g_meta"} == set(public), "the list in docs/api.md"
    assert len(public) > 4
    assert not {name for name, value in public.items() if identity(value) not in reference}


def test_reference_has_something_of_every_module(reference):
    names = {m.name for m in pkgutil.walk_packages(l2g_meta.__path__, "l2g_meta.")} - {"l2g_meta.__main__"}
    internal = {f"l2g_meta.{name}" for name in INTERNAL}
    names = {name for name in names if not name.startswith(COMMANDS)}
    assert internal <= names, "INTERNAL names a module that is gone"
    modules = [importlib.import_module(name) for name in sorted(names - internal)]
    missing = [m.__name__ for m in modules if own(m) and reference.isdisjoint(identity(getattr(m, n)) for n in own(m))]
    assert not missing, "need a directive in docs/api, or a line in INTERNAL"


def test_documented_names_have_a_docstring():
    values = {name: resolved(name) for name in documented()}
    silent = [name for name, value in values.items() if callable(value) and not inspect.getdoc(value)]
    assert not silent


def test_there_are_tutorials():
    assert {page.stem for page in TUTORIALS} >= {
        "classify_photos",
        "own_protonet",
        "own_head",
        "from_maml",
        "read_report",
    }


def python_blocks(page: Path) -> list[str]:
    """The fenced Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def unindented(code: str) -> str:
    """Code without the indentation of its lines: what stands in a function of a script stands alone on a page."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_shows_its_script(page):
    scripts = SCRIPTS.get(page.stem, [page.stem])  # test_examples.py runs them
    sources = {name: unindented((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")) for name in scripts}
    blocks = [unindented(code) for code in python_blocks(page)]
    assert not [code for code in blocks if not any(code in source for source in sources.values())]
    assert not [name for name, source in sources.items() if not any(code in source for code in blocks)]
    assert not [name for name in scripts if f"python examples/{name}.py" not in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code in python_blocks(page):  # one after the other, as a reader runs them
        exec(compile(code, str(page), "exec"), names)  # noqa: S102


def shell_commands(page: Path) -> list[str]:
    """What a page's shell blocks give to ``l2g``."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    command = re.compile(r"(?:torchrun .*-m )?l2g(?:_meta)? (\w.*?)(?:  +#.*| > .*)?$")
    return [found[1].replace('"$@"', "").rstrip(" &") for line in lines if (found := command.match(line))]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES, *TUTORIALS], ids=lambda page: page.stem)
def test_commands_of_a_page_have_the_flags_that_they_are_given(page):
    for command in shell_commands(page):
        build_parser([command.split()[0]]).parse_args(shlex.split(command.replace("$M", "--root DIR")))


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda page: page.stem)
def test_page_reads_on_github(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"literalinclude|\[\]\([^)]*\)", text), "need code and link texts on the page itself"
    home = page.relative_to(DOCS).with_suffix("").as_posix()
    listed = (DOCS / "index.md").read_text(encoding="utf-8").splitlines()
    assert home in ("index", *listed), "need the page in a toctree of index.md"


def test_no_page_waits_for_its_numbers():
    pages = {page.name: page.read_text(encoding="utf-8") for page in [*PAGES, *TUTORIALS]}
    assert not {name: gaps for name, text in pages.items() if (gaps := re.findall(r"^\{\w+\}$", text, re.MULTILINE))}


def test_tables_are_those_of_the_json():
    script = runpy.run_path(str(DOCS / "results_table.py"))
    texts = {page.name: page.read_text(encoding="utf-8") for page in script["PAGES"]}
    stale = [name for name, text in texts.items() if script["rewritten"](text) != text]
    assert not stale, "run python docs/results_table.py"
    tables = {name: [table.split()[0] for table, _ in script["TABLE"].findall(text)] for name, text in texts.items()}
    assert "glance" in tables["results.md"] and {"systems", "differences"} <= set(tables["paper-tables.md"])
    assert "study" in tables["notebook.md"]


def test_differences_in_words_stand_in_the_table():
    script = runpy.run_path(str(DOCS / "results_table.py"))
    table, prose = script["glance"](), (DOCS / "results.md").read_text(encoding="utf-8").split("<!-- end -->")[1]
    named = re.findall(r"[+−]\d+\.\d+ ± \d+\.\d+ \(\d seeds\)", prose)
    assert len(named) > 3 and not [difference for difference in named if difference not in table]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_pictures_and_files_of_a_page_are_there(page):
    if "_build" in page.parts:
        pytest.skip("not a page")
    links = re.findall(r"\]\(([^)#:\s]+\.\w+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).is_file()]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium, Debian's package")
def test_search_works_in_a_site_opened_from_the_disk(tmp_path):
    site = tmp_path / "site"
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, site]
    subprocess.run(build, check=True)
    browser = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{site.as_uri()}/search.html?q=alignment"]
    page = subprocess.run(browser, capture_output=True, text=True, check=True, timeout=300).stdout
    assert 'href="algorithm.html"' in page.split('id="search-results"')[1].split("</ul>")[0]
