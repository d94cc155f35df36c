"""What an engine must answer, computed by our own runtime: `expectations.py <bundle> <heldout.jsonl> <out.json>`.

Greedy tokens and prompt ids of real held-out conversations, and prompt ids of chats with hostile texts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.format.dialogue import NARRATOR, Dialogue
from data.format.dialogue_json import read_dialogues
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from model.attention_ops import Documents
from model.bundle_files import verify
from model.hugging_face import load_exported_model
from model.inference.generate import generate
from model.transformer import Transformer
from serving_export.export.chat_template import dialogue_of, engine_content
from serving_export.export.manifest import read_defaults
from serving_export.export.parity import HOSTILE_TEXTS, chat_message, choose_conversations, greedy_sampling, reply_place

N_CONVERSATIONS, N_NEW_TOKENS, LONGEST_TEXT = 20, 32, 50
N_TALKS, N_TURNS = 4, 5


def expected_reply(model: Transformer, tokenizer: DialogueTokenizer, dialogue: Dialogue, place: int) -> dict[str, Any]:
    """The prompt before message `place`, our greedy reply to it, and at each token how far our best two logits are."""
    before, character = dialogue.messages[:place], dialogue.character
    prompt = encode_prompt(tokenizer, before, character)
    reply = generate(model, [prompt], greedy_sampling(tokenizer, N_NEW_TOKENS))[0][0].tokens
    ids = prompt + reply
    with torch.no_grad():
        hidden_TD = model(torch.tensor(ids), Documents.from_lengths([len(ids)]))
        logits_TV = model.logits(hidden_TD[len(prompt) - 1 : -1])
        logits_TV[:, list(tokenizer.forbidden_in_reply)] = -torch.inf
        best_T2 = logits_TV.topk(2).values
    return {
        "id": dialogue.id,
        "messages": [as_engines_take_it(chat_message(message, character)) for message in before],
        "character": character,
        "prompt_ids": prompt,
        "reply_ids": reply,
        "gaps": (best_T2[:, 0] - best_T2[:, 1]).tolist(),
    }


def expected_chats(bundle: str, tokenizer: DialogueTokenizer) -> list[dict[str, Any]]:
    """Chats without names (the bundle's own apply) in hostile texts, with the prompt ids of training."""
    defaults = read_defaults(bundle)
    chats = []
    for text in HOSTILE_TEXTS:
        text = text[:LONGEST_TEXT]
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        ids = encode_prompt(tokenizer, dialogue_of(messages, defaults.user, defaults.character), defaults.character)
        chats.append({"messages": [as_engines_take_it(message) for message in messages], "prompt_ids": ids})
    return chats


def user_texts(dialogues: list[Dialogue]) -> list[list[str]]:
    """What users say, turn by turn, in the first dialogues that have so many turns."""
    said = [[m.text for m in d.messages if m.speaker not in (d.character, NARRATOR)] for d in dialogues]
    return [texts[:N_TURNS] for texts in said if len(texts) >= N_TURNS][:N_TALKS]


def as_engines_take_it(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": engine_content(message["content"], message["role"])}


def main(bundle: str, heldout: str, out: str) -> None:
    """Write the expectations; raises when the bundle is not whole or there are too few conversations."""
    verify(bundle)
    torch.set_num_threads(1)
    model, tokenizer = load_exported_model(bundle), DialogueTokenizer.load(bundle)
    longest = model.config.max_length - N_NEW_TOKENS
    places = [(d, place) for d in read_dialogues(heldout) if (place := reply_place(tokenizer, d, longest))]
    where = {dialogue.id: place for dialogue, place in places}
    chosen = choose_conversations(tokenizer, [dialogue for dialogue, _ in places], N_CONVERSATIONS)
    content = {
        "n_new_tokens": N_NEW_TOKENS,
        "max_length": model.config.max_length,
        "replies": [expected_reply(model, tokenizer, d, where[d.id]) for d in chosen],
        "chats": expected_chats(bundle, tokenizer),
        "talks": [{"said": texts} for texts in user_texts(chosen)],
        "forbidden_ids": list(tokenizer.forbidden_in_reply),
    }
    Path(out).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
