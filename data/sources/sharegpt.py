"""Conversations in the format of ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}."""

from typing import Literal

from data.sources.json_source import JsonSource
from data.sources.role_format import RoleFormat


class SharegptFormat(RoleFormat):
    """One conversation per record."""

    kind: Literal["sharegpt"]


class SharegptSource(SharegptFormat, JsonSource):
    """Files with one conversation per line, or a .json list of them."""

    kind: Literal["sharegpt"]
