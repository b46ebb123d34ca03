"""Write the page docs/recipe.md from the descriptions of the fields and the rules."""

from __future__ import annotations

from collections.abc import Iterator

from bd3_scale.recipe.checks import DATA_RULES, RULES
from bd3_scale.recipe.reference import FieldDoc, fields, section_of, summary
from bd3_scale.recipe.rules import Rule, in_order

_HEAD = """\
# The recipe

A recipe is a YAML file with everything that a person decides about a run. This page is generated: renew it with
`bd3-scale recipe explain --markdown > docs/recipe.md`. The same text for one key, or for one section:

```
bd3-scale recipe explain diffusion.block_size
bd3-scale recipe explain optimizer
```

`bd3-scale recipe list` shows the recipes of the package. Every command that takes a recipe takes such a name, too. A
recipe may begin with `extends: FILE`: its own keys are merged over those of that file. `KEY=VALUE` behind the recipe on
a command line replaces a value: `bd3-scale train quickstart optimizer.lr=1e-3`.

An unknown key, a value of the wrong type and a broken rule are errors before anything starts. `null` stands for no
value. A key with `[]` belongs to each item of a list. The unit `ratio` is a share, a factor or a probability; `number`
has no unit.
"""


def reference_page() -> str:
    """Return the page as Markdown, with a final newline."""
    found = fields()
    root = [field for field in found if not field.is_section and "." not in field.key]
    parts = [_HEAD, "## Keys at the top\n", _table(root)]
    for section in (field for field in found if field.is_section):
        parts += _section(
            section, [field for field in found if field.key.rpartition(".")[0].removesuffix("[]") == section.key]
        )
    parts += ["## Rules\n", "Each rule joins the keys behind it.\n", *_rules()]
    return "\n".join(parts)


def _section(section: FieldDoc, inside: list[FieldDoc]) -> Iterator[str]:
    yield f"## `{section.key}`\n"
    kind = section_of(section.key)
    yield f"{summary(kind) if kind else ''}\n"
    if section.default == "null":
        yield f"{section.description}\n"
    yield _table(inside)


def _table(found: list[FieldDoc]) -> str:
    lines = ["| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in found:
        name = field.key.rpartition(".")[2]
        default = f"`{field.default}`" if field.default not in ("", "required") else field.default
        lines.append(f"| `{name}` | {field.type} | {default} | {field.unit} | {_cell(field.description)} |")
    return "\n".join(lines) + "\n"


def _rules() -> Iterator[str]:
    yield "\n".join(_rule(rule) for rule in in_order(RULES))
    yield "\nOnce the data are prepared:\n"
    yield "\n".join(_rule(rule) for rule in in_order(DATA_RULES)) + "\n"


def _rule(rule: Rule) -> str:
    return f"- {rule.text} ({', '.join(f'`{key}`' for key in rule.keys)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
