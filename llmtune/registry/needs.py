"""Requirements of a named setting: packages that must be installed, credentials that must be set."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from llmtune.config import credential_is_set


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A Python package.

    Attributes:
        modules: Names to import; one that is found is enough.
        install: Argument of ``pip install``.
        least: The oldest version that works; empty where every version does.
        distribution: Name that the version is looked up by; needed with ``least``.
    """

    modules: tuple[str, ...]
    install: str
    least: str = ""
    distribution: str = ""

    @property
    def command(self) -> str:
        """The command that installs the package."""
        quoted = f"'{self.install}'" if set("[]<>=") & set(self.install) else self.install
        return f"pip install {quoted}"

    @property
    def is_installed(self) -> bool:
        """True if a module of the package can be found in a version that works; nothing is imported."""
        return any(map(_is_found, self.modules)) and self._is_new_enough

    @property
    def _is_new_enough(self) -> bool:
        if not self.least:
            return True
        from packaging.version import Version

        try:
            return Version(version(self.distribution)) >= Version(self.least)
        except PackageNotFoundError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """An account or a surrounding that a tracker reports to.

    Attributes:
        variables: Environment variables; one that is set is enough.
        files: Files below the home folder that hold a login: ``(path, text in the file)``.
        command: The command that sets the credential.
    """

    variables: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    command: str

    @property
    def is_set(self) -> bool:
        """True if a variable or a file holds the credential."""
        return credential_is_set(self.variables, self.files)


def missing_packages(packages: Iterable[Package]) -> tuple[Package, ...]:
    """Return the packages that are not installed."""
    return tuple(package for package in packages if not package.is_installed)


def _is_found(module: str) -> bool:
    """Return True if the module can be imported. A folder without code, such as ``wandb/`` with logs, is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
