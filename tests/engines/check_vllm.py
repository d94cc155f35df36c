"""Does vLLM do with the bundle what our runtime does? `check_vllm.py <bundle> <expected.json>`, in vLLM's venv.

Offline and through `vllm serve`; one line a check, then `N passed, M failed`. Imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NEAR_TIE = 1e-4  # logits; parity in float32 is held to the same, so two engines may order such a pair either way
START_SECONDS, REQUEST_SECONDS, END_SECONDS = 480, 120, 30


class Report:
    """Counts and prints checks."""

    def __init__(self) -> None:
        self.n_passed = self.n_failed = self.n_near_ties = 0

    def check(self, name: str, problem: str | None) -> None:
        """Print one line; `problem` is None when all is well."""
        self.n_passed += problem is None
        self.n_failed += problem is not None
        print(f"{'ok  ' if problem is None else 'FAIL'} {name}{'' if problem is None else ': ' + problem}", flush=True)

    def reply_problem(self, case: dict[str, Any], tokens: list[int]) -> str | None:
        """Why greedy `tokens` are not ours; a different choice between two logits closer than NEAR_TIE is allowed."""
        ours = case["reply_ids"]
        if tokens == ours:
            return None
        place = first_difference(tokens, ours)
        gap = case["gaps"][min(place, len(ours) - 1)]
        if place < len(ours) and gap < NEAR_TIE:
            self.n_near_ties += 1
            return None
        found, expected = tokens[place : place + 4], ours[place : place + 4]
        return f"token {place} on: {found}, ours {expected}; our best two logits are {gap:.1e} apart there"


def first_difference(found: list[int], expected: list[int]) -> int:
    """Where two lists part."""
    return next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))


def prompt_problem(found: list[int] | None, expected: list[int]) -> str | None:
    """Why the ids of a rendered prompt are not those of training."""
    if found == expected:
        return None
    if found is None:
        return "the server returned no prompt ids"
    return f"{len(found)} ids, expected {len(expected)}; they differ from {first_difference(found, expected)} on"


def check_offline(bundle: str, expected: dict[str, Any], report: Report) -> None:
    """Greedy replies of vLLM's offline engine to prompts of token ids."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=bundle, dtype="float32", max_model_len=expected["max_length"], max_num_seqs=8, enforce_eager=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=case["prompt_ids"]) for case in expected["replies"]]
    greedy = SamplingParams(temperature=0.0, max_tokens=expected["n_new_tokens"])
    outputs = engine.generate(prompts, greedy, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()  # its memory is needed for the server
    for case, output in zip(expected["replies"], outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        report.check(f"offline, {described(case)}", report.reply_problem(case, tokens))


def check_served(bundle: str, expected: dict[str, Any], report: Report) -> None:
    """The same through the chat endpoint, which renders the prompt itself; and prompts of hostile texts."""
    with served(bundle, expected["max_length"]) as url:
        common = {"model": bundle, "temperature": 0.0, "return_token_ids": True}
        for case in expected["replies"]:
            request = {
                "messages": case["messages"],
                "max_tokens": expected["n_new_tokens"],
                "chat_template_kwargs": {"character": case["character"]},
            }
            answer = post(f"{url}/v1/chat/completions", {**common, **request})
            problem = prompt_problem(answer.get("prompt_token_ids"), case["prompt_ids"])
            problem = problem or report.reply_problem(case, list(answer["choices"][0]["token_ids"]))
            report.check(f"served, {described(case)}", problem)
        for case in expected["chats"]:
            answer = post(f"{url}/v1/chat/completions", {**common, "messages": case["messages"], "max_tokens": 1})
            text = repr(case["messages"][1]["content"][:40])
            report.check(f"served, text {text}", prompt_problem(answer.get("prompt_token_ids"), case["prompt_ids"]))
        for case in expected["talks"]:
            name = f"served, {len(case['said'])} turns from {case['said'][0][:30]!r}"
            report.check(name, turns_problem(url, common, case, expected["n_new_tokens"]))
        biased = {"logit_bias": {str(token): 100 for token in expected["forbidden_ids"]}, "max_tokens": 8}
        messages = [{"role": "user", "content": expected["talks"][0]["said"][0]}]
        answer = post(f"{url}/v1/chat/completions", {**common, **biased, "messages": messages})
        report.check("served, a reply ends at a token that no reply may hold", end_problem(answer["choices"][0]))


def turns_problem(url: str, common: dict[str, Any], case: dict[str, Any], n_new_tokens: int) -> str | None:
    """Why a turn's prompt does not begin with the one before and the reply to it, which was sent back as it came.

    A reply in pieces that the tokenizer would not choose for its text, as a model of few steps draws them, cannot be
    compared: there the ids up to the reply count.
    """
    messages: list[dict[str, Any]] = []
    before: list[int] = []
    n_compared = 0
    for number, text in enumerate(case["said"]):
        messages.append({"role": "user", "content": text})
        answer = post(f"{url}/v1/chat/completions", {**common, "messages": messages, "max_tokens": n_new_tokens})
        prompt, choice = answer["prompt_token_ids"], answer["choices"][0]
        if prompt[: len(before)] != before:
            shared = first_difference(prompt, before)
            return f"turn {number + 1}: {shared} of the {len(before)} ids before it are shared"
        content = choice["message"]["content"]
        messages.append({"role": "assistant", "content": content})
        again = post(f"{url}/tokenize", {"model": common["model"], "prompt": content, "add_special_tokens": False})
        is_whole = choice["finish_reason"] == "stop"
        drawn = choice["token_ids"][:-1] if is_whole else choice["token_ids"]
        is_comparable = content.startswith(" ") and again["tokens"] == drawn  # " text", as all replies are trained
        before = prompt + (choice["token_ids"] if is_comparable else [])
        n_compared += len(before) > len(prompt)
    if n_compared < 2:
        print(f"note {case['said'][0][:30]!r}: too few replies to compare ({n_compared}); train longer", flush=True)
    return None


def end_problem(choice: dict[str, Any]) -> str | None:
    if choice["finish_reason"] == "stop" and len(choice["token_ids"]) == 1 and not choice["message"]["content"]:
        return None
    return f"{len(choice['token_ids'])} tokens, {choice['message']['content']!r}"


def described(case: dict[str, Any]) -> str:
    return f"conversation {case['id'][:8]}: {len(case['prompt_ids'])} + {len(case['reply_ids'])} tokens"


@contextmanager
def served(bundle: str, max_length: int) -> Iterator[str]:
    """`vllm serve` on a free port of this machine; ended at the end, with what it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "vllm", "serve", bundle, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", str(max_length), "--max-num-seqs", "8", "--enforce-eager",
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        # a session of its own, so that the group can be ended by its id, workers included
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process)
            yield url
        except BaseException:
            log.seek(0)
            print("".join(log.readlines()[-40:]), file=sys.stderr)
            raise
        finally:
            end(process)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve was not ready in {START_SECONDS} s")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            parsed: dict[str, Any] = json.load(answer)
            return parsed
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode()[:500]}") from None


def main(bundle: str, expected_path: str) -> int:
    """0 when every check passed."""
    expected = json.loads(Path(expected_path).read_text())
    report = Report()
    for check in (check_offline, check_served):
        try:
            check(bundle, expected, report)
        except Exception as error:  # one engine mode that cannot run must not hide the other
            report.check(check.__name__, f"{type(error).__name__}: {error}")
    if report.n_near_ties:
        print(f"{report.n_near_ties} replies parted from ours at logits closer than {NEAR_TIE:.0e}, which is allowed")
    print(f"{report.n_passed} passed, {report.n_failed} failed")
    return 1 if report.n_failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
