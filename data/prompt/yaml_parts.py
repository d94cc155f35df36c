"""YAML of prompt parts: PyYAML's safe loader, as in Prompt Poet, but duplicate keys are errors and names are
strings."""

from collections.abc import Sequence
from typing import Any

import yaml

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TYPED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value"))


def load_records(text: str, word_keys: Sequence[str], list_keys: Sequence[str]) -> Any:
    """The data of `text`. In mappings of a list, values of `word_keys` are strings as written (a speaker called No is
    not a boolean), and so are the items of lists in `list_keys`. Raises yaml.YAMLError."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        _keep_words(node, word_keys, list_keys)
        return None if node is None else loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # an invalid date or number
        raise yaml.YAMLError(str(error)) from None


class _UniqueKeys(Loader):
    """PyYAML's safe loader that rejects duplicate keys instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _keep_words(node: yaml.Node | None, word_keys: Sequence[str], list_keys: Sequence[str]) -> None:
    for record in node.value if isinstance(node, yaml.SequenceNode) else ():
        for i, (key, value) in enumerate(record.value if isinstance(record, yaml.MappingNode) else ()):
            if key.value in word_keys:
                record.value[i] = (key, _as_written(value))
            elif key.value in list_keys and isinstance(value, yaml.SequenceNode):
                value.value[:] = [_as_written(item) for item in value.value]
                _keep_words(value, word_keys, ())


def _as_written(node: yaml.Node) -> yaml.Node:
    """A copy, because an alias elsewhere keeps its type."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _TYPED:
        return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark, node.style)
