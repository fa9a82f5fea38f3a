"""Write the table of docs/verify.md of what the files alone cannot tell, from the tests' own list.

.venv/bin/python scripts/verify_table.py          writes it
.venv/bin/python scripts/verify_table.py --check  exits with 1 if it is out of date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
START, END = "<!-- scripts/verify_table.py -->\n", "<!-- end -->\n"


def written(text: str) -> str:
    """Returns the page with the table of today."""
    from attack_levels import table

    before, _, rest = text.partition(START)
    return f"{before}{START}{table()}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Writes the page, or says whether it is out of date."""
    page = ROOT / "docs" / "verify.md"
    text = page.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(written(text) != text)
    page.write_text(written(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
