"""Writes the reference pages of the documentation, docs/reference/, from the code: commands, settings and metrics; and
the README's line on GPUs, from the record of `minpro gpu-check`.

    python -m docs.generator            # write the pages
    python -m docs.generator --check    # exit with 1 if a page is not what the code gives

tests/unit/repository/test_reference.py makes the same check.
"""

import argparse
import sys

from docs.generator.pages import FOLDER, all_pages
from docs.generator.status import README, with_status
from minpro_megatron.files.replacement import replace_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the pages with the code instead of writing them")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    pages = all_pages()
    old = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    left = sorted(set(FOLDER.glob("*.md")) - pages.keys())
    for path in [*old, *left]:
        if check:
            print(f"{path.name} is not what the code gives: run python -m docs.generator")
        elif path in left:
            path.unlink()
        else:
            path.write_text(pages[path], encoding="utf-8")
            print(f"wrote {path.name}")
    readme = README.read_text(encoding="utf-8")
    outdated = with_status(readme) != readme
    if outdated and check:
        print("README.md does not state the record of the GPU checks: run python -m docs.generator")
    elif outdated:
        replace_file(README, with_status(readme))
        print("wrote the status in README.md")
    return 1 if check and (old or left or outdated) else 0


if __name__ == "__main__":
    sys.exit(main())
