"""A hook of mkdocs: the site is laid out as the repository is, so that a link leads to the same place here and there.

README.md is the home page, and the pages of docs/ keep their folder; no text is copied and no link rewritten.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Beside docs/: what is a page, and what pages link to.
_PATTERNS = (
    "*.md",
    "docs/**/*.*",
    "benchmarks/**/*.md",
    "benchmarks/results/*.png",
    "tests/faults/bad_input.csv",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the files of the repository in place of those that mkdocs found in docs/; those of the theme stay."""
    root = Path(config.config_file_path).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({path for pattern in _PATTERNS for path in root.glob(pattern)}):
        source = path.relative_to(root).as_posix()
        files.append(File(source, str(root), config.site_dir, config.use_directory_urls))
    return files
