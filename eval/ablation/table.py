"""table.md of an ablation: every figure with its interval, and beside each table how it was made."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.report import interval_text, number_text, signed_text

Report = Mapping[str, Any]


def key_figure(report: Report) -> str:
    """One line: what the smallest cache of a long conversation costs."""
    against, arms = report["against"], report["arms"]
    length = list(arms[against]["kv_bytes"])[-1]
    smallest = min(arms, key=lambda name: arms[name]["kv_bytes"][length])
    if smallest == against:
        return f"{against} {number_text(report['loss']['arms'][against]['loss']['value'], 3)} nats"
    share = arms[against]["kv_bytes"][length] / arms[smallest]["kv_bytes"][length]
    difference = report["loss"]["arms"][smallest]["difference"]
    return (
        f"{smallest} {_signed(difference)} nats against {against}, cache of {length} tokens {share:.0f} times smaller"
    )


def render_table(report: Report) -> str:
    """The Markdown text, for `report` as plain JSON values."""
    parts = [
        f"# {report['title']}",
        f"{report['created']}, {report['device']}, torch {report['torch']}. Intervals: "
        f"{100 * report['bootstrap']['confidence_level']:.0f}%, bootstrap over dialogues. "
        "Loss, ranking and recall are computed in float32 from the trained 16-bit weights.",
        _summary(report),
        _loss(report, "by_context", "tokens", "Loss by the tokens of the dialogue that come before"),
        _loss(report, "by_turn", "turns", "Loss by the number of the message (text only)"),
        _recall(report),
        _speed(report),
        _runs(report),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report) -> str:
    lengths = list(next(iter(report["arms"].values()))["kv_bytes"])
    head = ["arm", "parameters", "best lr", "held-out loss", f"less {report['against']}'s", "reply ranked first"]
    head += ["KV bytes/token", *(f"KV of {int(length):,} tokens" for length in lengths), "spikes"]
    rows = []
    for name, arm in report["arms"].items():
        loss, first = report["loss"]["arms"][name], report["ranking"]["models"][name]["mean_logprob"]["recall_at_1"]
        best = _best_run(arm)
        rows.append(
            [
                f"**{name}**", f"{arm['n_parameters'] / 1e6:.2f}M", _lr(arm), _with_interval(loss["loss"]),
                "" if loss["difference"] is None else _signed(loss["difference"]),
                _with_interval(first, 1, percent=True), f"{arm['kv_bytes_per_token']:,}",
                *(_bytes(arm["kv_bytes"][length]) for length in lengths),
                " + ".join(str(best["spikes"][key]["count"]) for key in ("loss", "gradient_norm")),
            ]
        )  # fmt: skip
    loss, ranking, spikes = report["loss"], report["ranking"], report["spikes"]
    edge = "\\* the best of the learning rates tried is the largest or the smallest of them: another may be better. "
    edge = edge if any(arm["best_is_at_the_edge"] for arm in report["arms"].values()) else ""
    return (
        f"{_markdown(head, rows)}\n\n"
        f"{edge}Loss in nats a token, on {loss['n_targets']:,} tokens of {loss['n_dialogues']} held-out dialogues, in "
        f"rows that no learning rate was chosen on. Ranking: {ranking['n_contexts']} contexts, "
        f"{ranking['n_candidates']} replies each, chance {number_text(1 / ranking['n_candidates'], 1, True)}. "
        f"KV in 16 bits; a local layer keeps its window. Spikes: steps whose training loss + gradient norm exceed the "
        f"{spikes['window']} steps before by {spikes['sigma']:g} standard deviations."
    )


def _loss(report: Report, part: str, key: str, title: str) -> str:
    arms, against = report["loss"]["arms"], report["against"]
    head = [key, "targets", f"{against}", *(f"{name} less {against}" for name in arms if name != against)]
    rows = []
    for number, base in enumerate(arms[against][part]):
        bins = [figures[part][number] for name, figures in arms.items() if name != against]
        differences = [_signed(b["difference"]) for b in bins]
        rows.append([base[key], f"{base['loss']['n']:,}", number_text(base["loss"]["value"], 3), *differences])
    return f"## {title}\n\n{_markdown(head, rows)}"


def _recall(report: Report) -> str:
    recall, against = report["recall"], report["against"]
    head = ["distance", *(f"{name}" for name in report["arms"])]
    gain_rows, accuracy_rows = [], []
    for at in recall["distances"]:
        where = f"{at['distance']['mean']:.0f} ({at['distance']['least']}-{at['distance']['most']})"
        models = at["models"].values()
        gain_rows.append([where, *(_with_interval(model["gain"]) for model in models)])
        accuracy_rows.append([where, *(_with_interval(model["accuracy"], 1, percent=True) for model in models)])
    return (
        "## Recall of a fact stated earlier\n\n"
        "What stating a value adds to its log-probability (nats) where it is asked again, against stating another:\n\n"
        f"{_markdown(head, gain_rows)}\n\n"
        f"How often the stated value is the likeliest of {recall['n_candidates']} "
        f"(chance {number_text(recall['chance'], 1, True)}):\n\n{_markdown(head, accuracy_rows)}\n\n"
        f"{recall['distances'][0]['n']} facts ({', '.join(recall['kinds'])}), each asked at every distance (tokens) in "
        f"the same real conversation; differences to {against} with intervals are in report.json."
    )


def _speed(report: Report) -> str:
    speed = report["speed"]
    head = ["arm"]
    for batch in speed["batches"]:
        head += [f"batch {batch}: tokens/s", "slowest to fastest", "first token"]
    rows = []
    for name, figures in speed["arms"].items():
        row = [name]
        for at in figures:
            row += [f"{at['tokens_per_second']:,.0f}", f"{at['slowest']:,.0f} to {at['fastest']:,.0f}"]
            row += [f"{at['first_token_ms']:.1f} ms"]
        rows.append(row)
    return (
        f"## Decoding speed of the reference runtime\n\n{_markdown(head, rows)}\n\n"
        f"{speed['device']}, {speed['precision']}, prompts of {speed['prompt_tokens']} tokens, {speed['new_tokens']} "
        f"greedy tokens each, median of {speed['repeats']} passes, the arms in turn. model/inference/generate.py is "
        "written to be read: small models wait for Python there, not for memory, so that a small cache shows little. A "
        "serving engine is faster, and shows more."
    )


def _runs(report: Report) -> str:
    head = [
        "run",
        "lr",
        "held-out loss",
        "loss spikes",
        "largest loss / mean",
        "gradient spikes",
        "largest norm / mean",
    ]
    rows = []
    for arm in report["arms"].values():
        for run in arm["runs"]:
            loss = number_text(run["heldout_loss"], 4)
            spikes = [run["spikes"][key] for key in ("loss", "gradient_norm")]
            counted = [
                text for s in spikes for text in (f"{s['count']} of {s['n_steps']}", number_text(s["max_ratio"], 2))
            ]
            loss = f"**{loss}**" if run["run_dir"] == arm["run_dir"] else loss
            rows.append([run["run_dir"], f"{run['lr']:g}", loss, *counted])
    return (
        f"## Every run\n\n{_markdown(head, rows)}\n\n"
        "The held-out loss here is training's own, on the rows that the learning rate (bold) was chosen on."
    )


def _best_run(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(run for run in arm["runs"] if run["run_dir"] == arm["run_dir"])


def _lr(arm: Mapping[str, Any]) -> str:
    return f"{arm['lr']:g}" + ("\\*" if arm["best_is_at_the_edge"] else "")


def _with_interval(estimate: Mapping[str, Any], digits: int = 3, percent: bool = False) -> str:
    return f"{number_text(estimate['value'], digits, percent)} {interval_text(estimate, digits, percent)}".strip()


def _signed(estimate: Mapping[str, Any]) -> str:
    return f"{signed_text(estimate['value'], 3)} {interval_text(estimate, 3)}".strip()


def _bytes(n: int) -> str:
    """`36.0 KiB`, `2.3 MiB`."""
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.0f} KiB"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
