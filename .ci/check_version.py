#!/usr/bin/env python3
"""Is a tag the version that it tags? `python .ci/check_version.py v0.2.0`; no package is needed."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Why a release must not have this tag."""
    version = stated(root / "fsr_vllm" / "__init__.py")
    found = []
    if tag != f"v{version}":
        found.append(
            f"the tag is {tag}, fsr_vllm.__version__ is {version}: it should be v{version}"
        )
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YEAR-MONTH-DAY'")
    return found


def stated(file: Path) -> str:
    """The version that a module states, read without running it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit(f"{file} states no __version__")


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    found = problems(sys.argv[1])
    if found:
        raise SystemExit("\n".join(found))
    print(f"{sys.argv[1]} is the version of this code")


if __name__ == "__main__":
    main()
