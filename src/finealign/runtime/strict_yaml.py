"""Parse YAML from untrusted sources: plain values only, bounded in size, and without repeated keys."""

import sys
from typing import Any

import yaml

from finealign.errors import ConfigError, one_line

MOST_VALUES = 10_000  # of one text; a settings file has about fifty


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text into plain values. Raises ConfigError, whose message says ``where`` the text came from."""
    try:
        return yaml.load(text, _Loader)
    # PyYAML does not wrap Python's errors for invalid dates and numbers, or for nesting that is too deep.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {one_line(error, 300)}.") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses repeated keys, aliases that expand to too much, and huge numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}  # number of values in each node, with every alias expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None or node in self._sizes:
            return node
        if alias:  # of a node that is not complete yet, so of one that contains it
            raise yaml.YAMLError(f"a value holds itself{node.start_mark}")
        if len(self._sizes) > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values")
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            keys: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"the key {key.value!r:.100} stands twice in one section{key.start_mark}")
                keys.add((key.tag, key.value))
        self._sizes[node] = 1 + sum(self._sizes[part] for part in inner)
        if self._sizes[node] > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values, each alias counted")
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value: str = super().construct_scalar(node)
        value.encode()  # raises UnicodeEncodeError for a lone surrogate, as "\\ud800"
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) > sys.float_info.max:
            raise yaml.YAMLError(f"a number of {value.bit_length()} bits is too large{node.start_mark}")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
