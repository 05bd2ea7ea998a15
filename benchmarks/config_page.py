"""docs/config.md from the configuration: a table per section and mapping, the presets, the patterns and the curves.

python benchmarks/config_page.py writes it (`make docs` does, too).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert import explain  # noqa: E402

INTRODUCTION = """\
# Configuration

This page is generated from `frugalbert/config.py` by `make docs`; `frugalbert explain` prints the same.

A run is one YAML file. Its sections, in this order, are the pipeline; a section that is not written means that its
stage does not run. Unknown keys, wrong types and contradictions are refused with the place and what to write instead.
On the command line, `section.key=value` overrides a setting and `section=null` removes a section. Where a list is
expected, a single value will do. Paths are relative to the YAML file.
"""


def markdown() -> str:
    """The text of docs/config.md: a table per section and mapping, the presets and the curves."""
    found = list(explain.all_keys())
    lines = [INTRODUCTION]
    top = [key for key in found if "." not in key.path]
    lines += ["| section | what it does |", "|---|---|"]
    lines += [f"| [`{key.name}`](#{key.name}) | {key.text} |" for key in top if key.nested]
    lines += ["", *_markdown_table([key for key in top if not key.nested])]
    parents = dict.fromkeys(key.path.rpartition(".")[0] for key in found if "." in key.path)
    texts = {key.path: key.text for key in found}
    for parent in parents:
        title = parent.removesuffix("[]").removesuffix(".NAME")
        lines += ["", f"{'###' if '.' in parent else '##'} {title}", ""]
        each = parent.endswith(("[]", ".NAME"))
        lines += [f"Each item of `{title}`, when written as a mapping." if each else texts[parent], ""]
        lines += _markdown_table([key for key in found if key.path.rpartition(".")[0] == parent])
    named = {
        "Architecture presets": explain.presets(),
        "Attention patterns": explain.patterns(),
        "Learning-rate curves": explain.curves(),
    }
    for title, table in named.items():
        lines += ["", f"## {title}", "", table.text, ""]
        lines += [f"| {' | '.join(table.head)} |", "|" + "---|" * len(table.head)]
        lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[explain.Key]) -> list[str]:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in rows:
        default = "mapping below" if key.nested and not key.default else f"`{key.default}`" if key.default else ""
        kind = "mapping" if key.nested else key.kind.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {kind} | {default} | {key.text.replace('|', chr(92) + '|')} |")
    return lines


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(markdown(), encoding="utf-8")
