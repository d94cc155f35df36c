"""STAR (MIT): task dialogues of a user and a wizard who plays the assistant, with times, and who disconnected."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from data.clean.stable_hash import pseudonym
from data.format.dialogue import NARRATOR, Dialogue, Message, check_times
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_of
from data.sources.record import LeftOut

USER, WIZARD = "User", "Wizard"
_SPEAKING = ("utter", "pick_suggestion")


class StarSource(RecordSource):
    """The messages of user and wizard; the character is the wizard, whose task the narrator gives. Most of the wizard's
    messages are selected suggestions: the message's metadata has the action and the suggestion's label. Only the user
    is a participant: the same workers play both roles, but the wizard's words come from a flow chart. Workers are
    hashed. Completion level (either may have disconnected), scenario, questionnaires and the wizard's id are in the
    metadata. Dialogues without messages are left out."""

    suffixes: ClassVar = (".json",)

    kind: Literal["star"]

    def records(self, file: CorpusFile) -> Iterator[tuple[int, Any]]:
        yield 1, json_of(file, dict)

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, Any]) -> Dialogue | LeftOut:
        said = tuple(
            _message(event)
            for event in record["Events"]
            if event["Agent"] in (USER, WIZARD) and event["Action"] in _SPEAKING
        )
        if not said:
            return LeftOut("nobody speaks")
        check_times(said)
        scenario = record["Scenario"]
        task = Message(NARRATOR, scenario["WizardTask"])
        speakers = {message.speaker for message in said}
        return Dialogue(
            id=str(record["DialogueID"]),
            messages=(task, *said),
            character=WIZARD if WIZARD in speakers else USER,
            participants=(pseudonym("star", record["AnonymizedUserWorkerID"]),),
            metadata={
                "completion": record["CompletionLevel"],
                "domains": scenario["Domains"],
                "user_task": scenario["UserTask"],
                "wizard": {"worker_id": pseudonym("star", record["AnonymizedWizardWorkerID"])},
                "user_answers": _answers(record["UserQuestionnaire"]),
                "wizard_answers": _answers(record["WizardQuestionnaire"]),
            },
        )


def _message(event: dict[str, Any]) -> Message:
    keys = {"Action": "action", "ActionLabel": "label"}
    return Message(
        event["Agent"],
        event["Text"],
        event["UnixTime"],
        {name: event[key] for key, name in keys.items() if key in event} if event["Agent"] == WIZARD else None,
    )


def _answers(questionnaire: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {item["Question"]: item["Answer"] for item in questionnaire or ()}
