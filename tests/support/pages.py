"""The pages of the documentation, and the blocks of code in them."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def python_blocks(page: Path) -> list[str]:
    """Return the indented blocks of a page; those inside of lists and tables are none."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=(?:\n)*    ))+", page.read_text(), re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in blocks if block.strip()]
