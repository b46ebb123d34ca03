"""Bring files that lie outside docs/ into the site, and their links with them; a hook of mkdocs, see mkdocs.yml.

A page links to files of the repository by relative paths, as GitHub shows them: `../benchmarks/step.md`. Of these the
site gets Markdown as pages, under the same path, other files as they are, under `repository/`, and folders as a list.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
# Two intervals side by side, such as [0, 1] [0.5, 1], which Markdown takes for a reference.
INTERVALS = re.compile(r"\] \[(?=\d)")
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def links_of(text: str) -> list[str]:
    """Return the relative links of a page, without their anchors; not those in code."""
    return [match[1] for match in LINK.finditer(CODE.sub("", text))]


def place(path: str) -> str:
    """Return where a file of the repository lies in the site's folder of sources.

    The README's place is taken by docs/index.md.
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return path if path.endswith(".md") else f"repository/{path}"


def target(page: str, link: str) -> str:
    """Return the path, in the repository, that a link of a page of the repository leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def listing(path: str) -> str:
    """Return a page for a folder: its Markdown files, by their first heading."""
    lines = [f"# {path}", ""]
    for page in sorted((ROOT / path).glob("*.md")):
        lines.append(f"- [{page.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}]({page.name})")
    return "\n".join(lines) + "\n"


def rewritten(page: str, text: str) -> str:
    """Return a page of the repository with its links as the site's folder has them."""
    here = posixpath.dirname(place(page))

    def relink(match: re.Match[str]) -> str:
        there = posixpath.relpath(place(target(page, match[1])), here or ".")
        return f"]({there}{match[2] or ''})"

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [INTERVALS.sub(r"] \[", LINK.sub(relink, text[end : code.start()])), code[0]]
        end = code.end()
    return "".join([*parts, INTERVALS.sub(r"] \[", LINK.sub(relink, text[end:]))])


def on_files(files: Files, config: Any) -> Files:
    """Add what pages of docs/ link to, and what these pages link to in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        for link in links_of((ROOT / page).read_text(encoding="utf-8")):
            path = target(page, link)
            if path in known or path.startswith("docs/") or not (ROOT / path).exists() or path == "README.md":
                continue
            known.add(path)
            if (ROOT / path).is_dir():
                files.append(File.generated(config, place(path), content=listing(path)))
                more = [f"{path}/{page.name}" for page in sorted((ROOT / path).glob("*.md"))]
            else:
                more = [path]
            for each in more:
                if each.endswith(".md") and (each == path or each not in known):
                    known.add(each)
                    text = (ROOT / each).read_text(encoding="utf-8")
                    files.append(File.generated(config, place(each), content=rewritten(each, text)))
                    waiting.append(each)
                elif not each.endswith(".md"):
                    files.append(File.generated(config, place(each), abs_src_path=str(ROOT / each)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/; those of other pages are rewritten already."""
    return rewritten(f"docs/{page.file.src_uri}", markdown) if page.file.generated_by is None else markdown
