"""YAML as people mean it: a file of keys, or the text of one value."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import ConfigError

EXPECTED = "expected a YAML file of keys such as `train: {epochs: 3}`"


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML itself would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"'{key}' is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a configuration file; none where it is empty.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeysLoader)
    except FileNotFoundError:
        raise ConfigError(str(path), [f"no such file; {EXPECTED}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read ({error}); {EXPECTED}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ConfigError(str(path), [f"is not valid YAML: {' '.join(str(error).split())}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(str(path), [f"holds no keys; {EXPECTED}"])
    return document


def parse_value(text: str) -> Any:
    """The YAML meaning of a text: ``3`` is a number, ``true`` a switch, ``[a, b]`` a list; else the text itself."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None and text.lower() not in ("null", "~") else value
