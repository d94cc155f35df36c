"""The sources that a recipe can name. A new corpus is a module with a DialogueSource, and a line here."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from data.sources.casino import CasinoSource
from data.sources.chat_jsonl import ChatJsonlSource
from data.sources.chitchat import ChitchatSource
from data.sources.feedback_events import FeedbackEventsSource
from data.sources.hh_rlhf import HhRlhfSource
from data.sources.hub import DatasetsSource
from data.sources.irc_ubuntu import IrcUbuntuSource
from data.sources.openai_messages import OpenaiMessagesSource
from data.sources.preference_pairs import PreferencePairsSource
from data.sources.qmsum import QmsumSource
from data.sources.self_dialogue import SelfDialogueSource
from data.sources.shakespeare import ShakespeareSource
from data.sources.sharegpt import SharegptSource
from data.sources.source import DialogueSource
from data.sources.star import StarSource
from data.sources.synthetic_persona_chat import SyntheticPersonaChatSource
from data.sources.topical_chat import TopicalChatSource

SOURCES: dict[str, type[DialogueSource]] = {
    "casino": CasinoSource,
    "chat_jsonl": ChatJsonlSource,
    "chitchat": ChitchatSource,
    "datasets": DatasetsSource,
    "feedback_events": FeedbackEventsSource,
    "hh_rlhf": HhRlhfSource,
    "irc_ubuntu": IrcUbuntuSource,
    "openai_messages": OpenaiMessagesSource,
    "preference_pairs": PreferencePairsSource,
    "qmsum": QmsumSource,
    "self_dialogue": SelfDialogueSource,
    "shakespeare": ShakespeareSource,
    "sharegpt": SharegptSource,
    "star": StarSource,
    "synthetic_persona_chat": SyntheticPersonaChatSource,
    "topical_chat": TopicalChatSource,
}

if TYPE_CHECKING:
    AnySource = DialogueSource
else:
    AnySource = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]  # noqa: UP007 (made at run time)


def named_sources(sources: Iterable[DialogueSource]) -> dict[str, DialogueSource]:
    """The sources of a recipe by name: the kind, and `kind_2` for the second of a kind."""
    named: dict[str, DialogueSource] = {}
    kinds: Counter[str] = Counter()
    for source in sources:
        kinds[source.kind] += 1
        number = kinds[source.kind]
        named[source.kind if number == 1 else f"{source.kind}_{number}"] = source
    return named
