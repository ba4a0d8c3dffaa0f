"""The pages say what happens: their programs run, print what is written below them, and their links lead somewhere."""

import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import metagrad as mg
from dpg.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
SOURCES = sorted(source for package in ("metagrad", "dpg") for source in (ROOT / package).rglob("*.py"))

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"\[([a-z]+[0-9]{4}[a-z]?)\b[^\]]*\]")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def programs(page: Path) -> Iterator[tuple[str, str | None]]:
    """The ```python blocks of a page, each with the ```text block that follows it before any other, or None."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    for (language, code), (next_language, output) in pairwise([*blocks, ("", "")]):
        if language == "python":
            yield code, output if next_language == "text" else None


@pytest.fixture
def as_for_a_reader() -> Iterator[None]:
    """Torch's own default dtype and a fixed seed, as in a fresh interpreter."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


# Torch's own, at the first use of forward mode in a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of forward mode, and of compilers
@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")  # of TRL's to transformers
@pytest.mark.parametrize("page", [page for page in PAGES if any(programs(page))], ids=name_of)
def test_programs_of_a_page_print_what_it_says(
    page: Path, as_for_a_reader: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # A program that writes files leaves none in the repository.
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (code, expected) in enumerate(programs(page), start=1):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, f"{name_of(page)}, program {number}", "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected, f"program {number} of {name_of(page)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    paths = [link.split("#")[0] for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    missing = [path for path in paths if path and not (page.parent / path).exists()]
    assert not missing


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name_of)
def test_cited_keys_are_in_the_references(path: Path) -> None:
    references = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\*\*\[([a-z0-9]+)\]\*\*", references, re.MULTILINE))
    cited = set(KEY.findall(path.read_text(encoding="utf-8")))
    assert cited <= known


def test_equations_named_in_the_code_are_in_the_theory() -> None:
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    numbered = set(re.findall(r" \((\d)\)$", theory, re.MULTILINE))
    named = {
        number
        for source in SOURCES
        for first, last in re.findall(r"theory\.md, eq\. (\d)(?:–(\d))?", source.read_text(encoding="utf-8"))
        for number in map(str, range(int(first), int(last or first) + 1))
    }
    assert named and named <= numbered


def test_the_api_page_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (metagrad\.[\w.]+)$", text, re.MULTILINE)) | set(re.findall(r"`mg\.([\w.]+)`", text))
    listed = {name.removeprefix("metagrad.") for name in listed}
    public = {
        *mg.__all__,
        *(f"optim.{name}" for name in mg.optim.__all__),
        *(f"check.{name}" for name in mg.check.__all__),
        *(f"attribution.{name}" for name in mg.attribution.__all__),
        *(f"distributed.{name}" for name in mg.distributed.__all__),
    }
    assert public <= listed, "not in docs/api.md"
    assert listed <= public, "in docs/api.md, but not public"


def test_every_page_is_in_the_site_and_the_index() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert set(re.findall(r"- ([\w.]+\.md)$", navigation, re.MULTILINE)) == pages
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {Path(link.split("#")[0]).name for link in LINK.findall(index)} >= pages - {"index.md"}


def test_every_setting_is_on_the_page() -> None:
    page = (ROOT / "docs" / "dpg.md").read_text(encoding="utf-8")
    table = page[page.index("### Settings") : page.index("## From Python")]
    assert set(re.findall(r"`(\w+)` \(", table)) == {field.name for field in fields(Settings)}
