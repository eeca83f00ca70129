"""Packages that benchmarks need beside the project's own."""

from importlib.util import find_spec


def needs(*packages: str) -> None:
    """ValueError for packages that a benchmark would miss hours later."""
    if missing := [name for name in packages if not find_spec(name)]:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install -e '.[benchmarks]'")
