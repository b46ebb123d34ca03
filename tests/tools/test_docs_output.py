"""Check the documents: their links lead somewhere, and what they show as output is what the commands print."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import TESTS
from tests.test_import_graph import FLOOR_OF
from tools.docs_output import OUTPUTS, ROOT, block_of, measured, normalised

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
LINKING = [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]
# Other tests compare the output on these pages (test_docs_python.py, integration/test_newer_version.py).
HELD_ELSEWHERE = {"python.md", "newer-version.md"}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
OUTPUT = {"text", "console"}
SHELL = {"", "sh", "bash"}
LANGUAGES = {*SHELL, "python", "yaml", "json", "diff", *OUTPUT}
# Lines in a block of commands begin with one of these.
PROGRAMS = (
    r"(\.venv/bin/|cluster/[\w/.-]+|bd3-scale|python(3\.\d+)?|make|pip|git|cp|mv|mkdir|cd|cat|rm|sh|source|\.|export|"
    r"torchrun|curl|docker|apptainer|apt-get|eval|[A-Z_]+=\S+)"
)
SCHEMES = ("https://", "http://", "mailto:")


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, language and content of each fenced block of code."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text[: match.start()].count("\n") + 1, match[2], match[3]


def prose(page: Path) -> str:
    """Return a page without its blocks and spans of code."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{number}" if number else slug for slug, most in found.items() for number in range(most + 1)}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def broken(page: Path, link: str) -> str | None:
    """Return why a link leads nowhere; external ones are only looked at for their form."""
    if link.startswith(SCHEMES):
        return None if re.fullmatch(r"(https?://[\w.-]+\.\w+(:\d+)?(/\S*)?|mailto:\S+@\S+)", link) else "is no address"
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return "is not there"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target)):
        return "has no such heading"
    return None


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [f"{link} {why}" for link in links(page) if (why := broken(page, link))] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, with `code`\n## Twice\n## Twice\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#a-heading-with-code) [b](other.md#twice-1) `[c](nowhere.md)`")
    assert [broken(page, link) for link in links(page)] == [None, None]
    assert broken(page, "nowhere.md") == "is not there"
    assert broken(page, "other.md#no-heading") == "has no such heading"
    assert broken(page, "https:/a.b") is None or broken(page, "https://a b") == "is no address"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_output_is_renewed_by_a_script(page: Path) -> None:
    named = {name: output for name, output in OUTPUTS.items() if ROOT / output.page == page}
    text = page.read_text(encoding="utf-8")
    under_marks = "".join(block_of(text, name) for name in named)
    wrong = []
    for line, language, content in blocks(page):
        where = f"{page.name}, line {line}"
        if language not in LANGUAGES:
            wrong.append(f"{where}: a block begins with its language, one of {sorted(LANGUAGES)}")
        elif language in OUTPUT and content not in under_marks and page.name not in HELD_ELSEWHERE:
            wrong.append(f"{where}: output that no script makes; give it a name in tools/docs_output.py")
        elif language in SHELL:
            for command in re.sub(r"\s*\\\n\s*", " ", content).splitlines():
                if command.strip() and not re.match(rf"#|{PROGRAMS}(\s|$|&)", command.strip()):
                    wrong.append(f"{where}: {command!r} is no command")
    assert wrong == []
    assert all("```text" in block_of(text, name) for name in named), "tools/docs_output.py has not filled it yet"


@pytest.mark.parametrize("name", [name for name, output in OUTPUTS.items() if output.cheap])
@pytest.mark.slow
def test_cheap_output_is_what_the_command_prints(name: str) -> None:
    page = (ROOT / OUTPUTS[name].page).read_text(encoding="utf-8")
    assert normalised(block_of(page, name)) == normalised(measured(OUTPUTS[name]))


def test_only_numbers_and_widths_are_left_out_of_the_comparison() -> None:
    assert normalised("│ step   │ 12,345 │ d792398bc0d3271a") == normalised("│ step │ 7 │ 1ac149a9f11667e8")
    assert normalised("a step of 3") != normalised("a save of 3")


def test_yaml_in_the_documents_names_keys_of_a_recipe() -> None:
    from pydantic import BaseModel

    from bd3_scale.recipe.schema import Recipe

    def unknown(value: object, section: type[BaseModel], path: str) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            if key not in section.model_fields:
                yield f"{path}{key}"
                continue
            annotation = section.model_fields[key].annotation
            sections = [annotation, *getattr(annotation, "__args__", ())]
            for kind in sections:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from unknown(inner, kind, f"{path}{key}.")

    for page in [ROOT / "README.md", *DOCS]:
        for line, language, content in blocks(page):
            if language == "yaml" and "processes_per_node" not in content:  # a site's profile
                assert list(unknown(yaml.safe_load(content), Recipe, "")) == [], f"{page.name}, line {line}"


def test_names_of_the_code_in_the_architecture_are_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| (`[^|]*\.py`[^|]*) \| ((?:`\w+`(?:, )?)+) \|$", page, re.MULTILINE)
    assert len(rows) > 15
    for files, names in rows:
        paths = [ROOT / "bd3_scale" / file for file in re.findall(r"`([^`]*)`", files)]
        defined = {
            node.name
            for path in paths
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert set(re.findall(r"`([^`]*)`", names)) <= defined, files
    for path in re.findall(r"`(bd3_scale/[\w/]+\.\w+)`", page):
        assert (ROOT / path).exists(), path


def test_the_plan_of_the_rooms_is_that_of_the_import_graph() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = {
        room: int(floor) - 1 for floor, room in re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE)
    }
    assert rows == {room: FLOOR_OF[room] for room in rows}
    assert {path.name for path in (ROOT / "bd3_scale").iterdir() if path.is_dir() and path.name in FLOOR_OF} <= set(
        rows
    )


@pytest.mark.parametrize(
    ("question", "path"),
    [
        ("where masks are drawn", ("docs/architecture.md", "### Where masks are drawn")),
        ("how a resume knows its data position", ("docs/architecture.md", "### How a resume finds its place")),
        ("how to add a schedule", ("docs/extend.md", "## A noise schedule")),
        ("what a recipe key means", ("docs/recipe.md", "#")),
        ("what to do after a crash", ("docs/failures.md", "Repeat the command")),
        ("how to run the quick tests", ("CONTRIBUTING.md", "make test-fast")),
    ],
)
def test_a_reader_finds_it_one_click_from_the_readme(question: str, path: tuple[str, str]) -> None:
    page, words = path
    assert any(link.partition("#")[0] == page for link in links(ROOT / "README.md")), question
    assert words in (ROOT / page).read_text(encoding="utf-8"), question


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert TESTS.parent == ROOT


@pytest.mark.slow
def test_flops_of_a_step_are_those_of_the_page() -> None:
    from tests.observe import test_flops as flops

    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    b8 = flops.M110.model_copy(
        update={"num_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8}
        | {"ffn_hidden_size": 12288}
    )
    shapes = {"110M": (flops.M110, 1024, 50257), "1B": (flops.B1, 4096, 128256), "8B": (b8, 4096, 151936)}
    for name, (model, length, vocabulary) in shapes.items():
        (said,) = re.findall(rf"^\| {name}, {length:,} \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
        batch = flops.sequences(2, length)
        next_token = flops.needed(model, vocabulary, flops.next_tokens(batch, device=flops.CPU))
        for copies, ratio in enumerate(said, 1):
            step = flops.needed(model, vocabulary, flops.noisy(batch, 16, copies=copies))
            assert step / copies / next_token == pytest.approx(float(ratio), abs=6e-3), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', page.read_text(encoding="utf-8"))
        fetched += re.findall(
            r'<link[^>]* rel="(?:stylesheet|preload)"[^>]* href="([^"]+)"', page.read_text(encoding="utf-8")
        )
        assert [address for address in fetched if "//" in address] == [], page.name
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "bd3_scale.api.Model.generate" in api
    assert "bd3_scale.registry.Registry" in api
