"""The replay counts what a plain loop over prompts counts, and the command prints its table and draws the curve."""

from itertools import pairwise
from pathlib import Path

import pytest

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.encode import encode_prompt, encode_reply
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer
from data.prompt.__main__ import main
from data.prompt.reuse import Rule, TokenizedConversation, naive, planned, replay, stepped, stitched
from data.prompt.template import PromptTemplate, conversation_values
from tests.corpora import CORPORA, needs_corpora
from tests.written_data import write_dialogues


def conversation(n: int, number: int = 0) -> Dialogue:
    said = [Message(("Bob", "Ann")[i % 2], f"{number} message {i} " + "word " * (i * 7 % 5)) for i in range(n)]
    return Dialogue(f"d{number}", (Message(NARRATOR, "A scene."), *said), "Ann")


def plain_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@pytest.mark.parametrize(
    ("rule", "options"),
    [(stepped(0.25), {"truncation_step": 50}), (planned(0.25), {}), (naive, {"truncation_step": 1})],
)
def test_replay_is_a_plain_loop_over_rendered_prompts(
    tokenizer: DialogueTokenizer, rule: Rule, options: dict[str, int]
) -> None:
    dialogue, limit = conversation(40), 203
    template, encoder = PromptTemplate(), MessageEncoder(tokenizer)
    prompts, replies, whole = [], [], []
    for i, message in enumerate(dialogue.messages):
        if message.speaker == "Ann":
            values = conversation_values(dialogue.messages[1:i], "Ann", "A scene.")
            prompts.append(template.render(values, encoder, limit, **options).tokens)
            replies.append(encode_reply(tokenizer, message.text))
            whole.append(encode_prompt(tokenizer, dialogue.messages[:i], "Ann"))
    result, beyond = replay([TokenizedConversation(dialogue, encoder, limit)], rule)
    assert result.turns == len(prompts) - 1
    assert result.prompt_tokens == sum(map(len, prompts[1:]))
    assert result.reused_tokens == sum(plain_prefix(a, b) for a, b in pairwise(prompts))
    with_replies = [prompt + reply for prompt, reply in zip(prompts, replies)]
    assert result.reused_with_reply == sum(plain_prefix(a, b) for a, b in zip(with_replies, prompts[1:]))
    assert 0 < result.moves < result.turns
    too_long = [values for values in whole if len(values) > limit]
    assert beyond.turns == len(too_long) > 0
    assert beyond.prompt_tokens == sum(map(len, prompts[-beyond.turns :]))
    assert beyond.shortest == min(map(len, prompts[-beyond.turns :]))


def test_what_fits_is_reused_whole(tokenizer: DialogueTokenizer) -> None:
    dialogue = conversation(20)
    result, beyond = replay([TokenizedConversation(dialogue, MessageEncoder(tokenizer), 10_000)], planned(0.25))
    assert (result.moves, beyond.turns, result.kept) == (0, 0, 1.0)
    last = encode_prompt(tokenizer, dialogue.messages[:-1], "Ann")
    assert result.reused_with_reply > result.reused_tokens > 0.8 * result.prompt_tokens > len(last)


def test_stitched_conversations_have_as_many_turns_as_asked() -> None:
    joined = list(stitched([conversation(10, number) for number in range(9)], 12))
    assert len(joined) == 3
    for dialogue in joined:
        assert sum(m.speaker == "Character" for m in dialogue.messages) == 12
        assert {m.speaker for m in dialogue.messages} == {"Character", "Partner", NARRATOR}
        assert [m.speaker for m in dialogue.messages].count(NARRATOR) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dialogues(tmp_path / "d.jsonl", [conversation(60, number) for number in range(3)])
    arguments = ["reuse", str(tmp_path / "d.jsonl"), "--limits", "300", "--vocab-size", "320", "--min-turns", "20"]
    plot = tmp_path / "plots" / "reuse.png"
    assert main([*arguments, "--stitched-turns", "40", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "planned" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--stitched-turns", "4000"]) == 2
    assert "lower --min-turns or --stitched-turns" in capsys.readouterr().err
    assert main(["reuse", "nothing:here"]) == 2
    assert "no source of kind 'nothing'" in capsys.readouterr().err
    assert main(["reuse", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@needs_corpora
def test_real_meetings_of_sixty_turns_and_more() -> None:
    """At a limit of 53 turns' tokens or more: 95% reused, a quarter of the context given up at most."""
    from data.prompt.reuse import evenly, n_turns, read_conversations, tokenizer_for

    dialogues = [d for d in read_conversations(f"qmsum:{CORPORA / 'qmsum'}") if n_turns(d) >= 60]
    some = evenly(dialogues, 3)
    encoder = MessageEncoder(tokenizer_for(some, 2000))
    sums, _ = replay([TokenizedConversation(dialogue, encoder, 100) for dialogue in some], naive)
    limit = round(60 * sums.new_tokens / sums.turns)
    result, beyond = replay([TokenizedConversation(dialogue, encoder, limit) for dialogue in some], planned(0.25))
    assert beyond.turns > result.turns / 2
    assert result.reuse >= 0.95
    assert result.kept >= 0.75
