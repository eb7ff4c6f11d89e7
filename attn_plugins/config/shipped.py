"""Files of settings that come with the package: those of configs/, found from any folder after ``pip install`` too."""

from pathlib import Path

from attn_plugins.core.options import did_you_mean

CONFIGS = Path(__file__).parents[1] / "configs"
"""In a checkout a link to the folder of this name beside the package."""


def found(path: str | Path) -> Path:
    """The file of this path; where there is none, and it begins with ``configs/``, the package's own."""
    path = Path(path).expanduser()
    if path.parts[:1] == (CONFIGS.name,) and not path.exists():
        shipped = CONFIGS.joinpath(*path.parts[1:])
        return shipped if shipped.exists() else path
    return path


def shipped_names(folder: str) -> list[str]:
    """Names of the YAML files in a folder of configs/."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def named(folder: str, name: str, what: str) -> Path:
    """The file of a name in a folder of configs/, or of a path that ends with .yaml or .yml.

    Args:
        what: it is, for messages: suite.

    Raises:
        ValueError: there is none of this name.
    """
    if name.endswith((".yaml", ".yml")):
        return found(name)
    names = shipped_names(folder)
    if name not in names:
        raise ValueError(f"{what}={name!r}{did_you_mean(name, names)}; allowed: {', '.join(names)}, or a YAML file")
    return CONFIGS / folder / f"{name}.yaml"
