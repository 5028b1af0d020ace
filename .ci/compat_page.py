#!/usr/bin/env python3
"""Writes the generated part of docs/compatibility.md from the records in fsr_vllm/compat.

With --check it writes nothing, and fails if the page is not what it would write.
"""

import argparse
import importlib
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
MARK = "<!-- Below: made by `python .ci/compat_page.py` from the records in fsr_vllm/compat. -->\n"


def main() -> int:
    """Write the page, or compare it; the exit status is 1 if it differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    text = PAGE.read_text()
    written, mark, _ = text.partition(MARK)
    page = written + MARK + generated()
    if arguments.check:
        same = bool(mark) and page == text
        print("" if same else f"{PAGE.name} is out of date: python .ci/compat_page.py")
        return int(not same)
    PAGE.write_text(page)
    return 0


def generated() -> str:
    """The records, one section per file of fsr_vllm/compat, and the attributes."""
    from fsr_vllm.compat.attributes import ATTRIBUTES
    from fsr_vllm.compat.patching import Entry, Patch, all_entries

    def versions(entry: Entry) -> str:
        missing = f"; missing: {entry.missing}" if entry.missing else ""
        return f"{entry.read} / {entry.run}{missing}"

    def until(entry: Entry) -> str:
        return entry.until + (f" ([upstream]({entry.link}))" if entry.link else "")

    def alike(entry: Entry) -> tuple[type, str, str, str]:
        return type(entry), entry.why, versions(entry), until(entry)

    lines = [
        "\n## Names of vLLM that are used\n",
        'Names that vLLM does not promise to keep. "Replaced" ones are wrapped, once and',
        "reversibly, and only where their signature is the one stated; the plugin refuses to start",
        "where it is not. Each can go when vLLM has what the last column says.",
    ]
    for file, entries in all_entries().items():
        module = importlib.import_module(f"fsr_vllm.compat.{file}")
        title = (module.__doc__ or "").strip().splitlines()[0]
        lines += [f"\n### {file}.py\n", title, ""]
        lines += ["| name | | why | read / run in | goes when |", "|---|---|---|---|---|"]
        for (kind, why, when, goes), group in groupby(entries, alike):
            names = "<br>".join(
                f"`{each.target}`" + (f" `{each.signature}`" if each.signature else "")
                for each in group
            )
            use = "replaced" if kind is Patch else "read"
            lines.append(f"| {names} | {use} | {why} | {when} | {goes} |")
    lines += ["\n## Attributes and keys of ours on objects of vLLM\n"]
    lines += ["| name | on | why |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.of} | {each.why} |" for each in ATTRIBUTES]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
