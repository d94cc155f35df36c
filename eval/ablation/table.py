"""table.md of an ablation: every figure with its interval, and how it was measured below each table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.number_text import estimate_text, number_text

Report = Mapping[str, Any]


def key_figure(report: Report) -> str:
    """One line: the loss difference of the arm with the smallest cache for a long conversation."""
    against, arms = report["against"], report["arms"]
    length = list(arms[against]["kv_bytes"])[-1]
    smallest = min(arms, key=lambda name: arms[name]["kv_bytes"][length])
    if smallest == against:
        return f"{against} {number_text(report['loss']['arms'][against]['loss']['value'], 3)} nats"
    share = arms[against]["kv_bytes"][length] / arms[smallest]["kv_bytes"][length]
    difference = _difference(report["loss"]["arms"][smallest]["difference"], report["training_spread"])
    return f"{smallest} {difference} nats against {against}, cache of {length} tokens {share:.0f} times smaller"


def render_table(report: Report) -> str:
    """The Markdown text, for `report` as plain JSON values."""
    parts = [
        f"# {report['title']}",
        f"{report['created']}, {report['device']}, torch {report['torch']}. Intervals: "
        f"{100 * report['bootstrap']['confidence_level']:.0f}%, bootstrap over dialogues. "
        "Loss, ranking and recall are computed in float32 from the stored weights.",
        _summary(report),
        _loss(report, "by_context", "tokens", "Loss by the number of earlier tokens of the dialogue"),
        _loss(report, "by_turn", "turns", "Loss by the number of the message (text only)"),
        _recall(report),
        _speed(report),
        _runs(report),
    ]
    return "\n\n".join(parts) + "\n"


def is_decided(difference: Mapping[str, Any], spread: float | None) -> bool:
    """Whether a difference excludes 0 and exceeds `spread`, the largest difference between trainings of one arm."""
    low, high = difference["low"], difference["high"]
    return spread is not None and low is not None and not low <= 0 <= high and abs(difference["value"]) > spread


def _difference(difference: Mapping[str, Any], spread: float | None) -> str:
    return estimate_text(difference, 3, is_signed=True) + ("" if is_decided(difference, spread) else ", not decided")


def _summary(report: Report) -> str:
    lengths = list(next(iter(report["arms"].values()))["kv_bytes"])
    head = ["arm", "parameters", "best lr", "held-out loss", f"minus {report['against']}", "reply ranked first"]
    head += ["KV bytes/token", *(f"KV of {int(length):,} tokens" for length in lengths), "spikes"]
    rows, spread = [], report["training_spread"]
    for name, arm in report["arms"].items():
        loss, first = report["loss"]["arms"][name], report["ranking"]["models"][name]["mean_logprob"]["recall_at_1"]
        best = next(run for run in arm["runs"] if run["run_dir"] == arm["run_dir"])
        rows.append(
            [
                f"**{name}**", f"{arm['n_parameters'] / 1e6:.2f}M",
                f"{arm['lr']:g}" + ("\\*" if arm["best_is_at_the_edge"] else ""), estimate_text(loss["loss"], 3),
                "" if loss["difference"] is None else _difference(loss["difference"], spread),
                estimate_text(first, 1, percent=True), f"{arm['kv_bytes_per_token']:,}",
                *(_bytes(arm["kv_bytes"][length]) for length in lengths),
                " + ".join(str(best["spikes"][key]["count"]) for key in ("loss", "gradient_norm")),
            ]
        )  # fmt: skip
    loss, ranking, spikes = report["loss"], report["ranking"], report["spikes"]
    edge = "\\* the best learning rate is the largest or smallest of those tried; another may be better. "
    edge = edge if any(arm["best_is_at_the_edge"] for arm in report["arms"].values()) else ""
    seeds = (
        "No arm has two runs with one learning rate, so the effect of another seed is unknown and no difference "
        "between arms is decided."
        if spread is None
        else f"Runs of one arm with the same learning rate differ by up to {number_text(spread, 3)} nats: a smaller "
        "difference between arms is not decided, whatever its interval, which covers dialogues and not trainings."
    )
    return (
        f"{markdown_table(head, rows)}\n\n"
        f"{edge}Loss in nats a token, on {loss['n_targets']:,} tokens of {loss['n_dialogues']} held-out dialogues, in "
        f"rows that no learning rate was chosen on. {seeds} Ranking: {ranking['n_contexts']} contexts, "
        f"{ranking['n_candidates']} replies each, chance {number_text(1 / ranking['n_candidates'], 1, True)}. "
        f"KV cache in 16 bits; a local layer keeps its window. Spikes: steps whose loss + gradient norm exceed "
        f"the mean of the {spikes['window']} steps before by {spikes['sigma']:g} standard deviations."
    )


def _loss(report: Report, part: str, key: str, title: str) -> str:
    arms, against = report["loss"]["arms"], report["against"]
    others = [figures[part] for name, figures in arms.items() if name != against]
    head = [key, "targets", against, *(f"{name} minus {against}" for name in arms if name != against)]
    rows = [
        [base[key], f"{base['loss']['n']:,}", number_text(base["loss"]["value"], 3),
         *(estimate_text(bins[number]["difference"], 3, is_signed=True) for bins in others)]
        for number, base in enumerate(arms[against][part])
    ]  # fmt: skip
    return f"## {title}\n\n{markdown_table(head, rows)}"


def _recall(report: Report) -> str:
    recall = report["recall"]
    head = ["distance", *report["arms"]]
    gain_rows, accuracy_rows = [], []
    for at in recall["distances"]:
        where = f"{at['distance']['mean']:.0f} ({at['distance']['least']}-{at['distance']['most']})"
        models = at["models"].values()
        gain_rows.append([where, *(estimate_text(model["gain"], 3) for model in models)])
        accuracy_rows.append([where, *(estimate_text(model["accuracy"], 1, percent=True) for model in models)])
    return (
        "## Recall of a fact stated earlier\n\n"
        "How much stating a value raises its log-probability (nats) in the answer, compared with stating another:\n\n"
        f"{markdown_table(head, gain_rows)}\n\n"
        f"How often the stated value is the most probable of {recall['n_candidates']} "
        f"(chance {number_text(recall['chance'], 1, True)}):\n\n{markdown_table(head, accuracy_rows)}\n\n"
        f"{recall['distances'][0]['n']} facts ({', '.join(recall['kinds'])}), each asked at every distance (tokens) in "
        f"the same real conversation; differences to {report['against']} with intervals are in report.json."
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
        f"## Decoding speed of the reference runtime\n\n{markdown_table(head, rows)}\n\n"
        f"{speed['device']}, {speed['precision']}, prompts of {speed['prompt_tokens']} tokens, {speed['new_tokens']} "
        f"greedy tokens each, median of {speed['repeats']} passes with the arms in turn. "
        "model/inference/generate.py is a readable reference, not a serving engine: these figures do not show what "
        "a small cache saves in one."
    )


def _runs(report: Report) -> str:
    head = ["run", "lr", "held-out loss", "loss spikes", "largest loss / mean", "gradient spikes"]
    head += ["largest norm / mean"]
    rows = []
    for arm in report["arms"].values():
        for run in arm["runs"]:
            loss = number_text(run["heldout_loss"], 4)
            row = [run["run_dir"], f"{run['lr']:g}", f"**{loss}**" if run["run_dir"] == arm["run_dir"] else loss]
            for spikes in (run["spikes"][key] for key in ("loss", "gradient_norm")):
                row += [f"{spikes['count']} of {spikes['n_steps']}", number_text(spikes["max_ratio"], 2)]
            rows.append(row)
    return (
        f"## Every run\n\n{markdown_table(head, rows)}\n\n"
        "Held-out loss as evaluated in training, on the rows that the learning rate (bold) was chosen on."
    )


def _bytes(n: int) -> str:
    """`36.0 KiB`, `2.3 MiB`."""
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.0f} KiB"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with the first column left-aligned and the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
