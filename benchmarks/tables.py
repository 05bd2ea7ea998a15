"""docs/benchmarks.md and the table of docs/reliability.md from the JSON files in benchmarks/results.

python benchmarks/tables.py writes them (`make docs` does, too).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Written by `python benchmarks/tables.py` from `benchmarks/results/*.json`. A ratio is taken within a round, in which the
arms take turns; *min – **median** – max* over the rounds. `make bench` takes the first six anew (hours, on an idle
machine); the others are studies of hours and days, whose commands stand beside them. What a file does not hold was not
measured.
"""
Found = dict[str, Any]


# ---- pieces ----------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, figures to the right."""
    cells = [list(map(str, row)) for row in rows]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def spread(value: Found | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value['min']:.{digits}f} – **{value['median']:.{digits}f}** – {value['max']:.{digits}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def where(found: Found) -> str:
    """The machine and versions of a result."""
    if several := [row for row in found.get("rows", ()) if "environment" in row]:
        return "; ".join(dict.fromkeys(map(where, several)))  # rows of several calls
    about = found.get("environment") or found.get("machine") or found
    if "versions" not in about:  # of several parts, taken at different times
        return "; ".join(f"{part}: {where(one)}" for part, one in about.items())
    versions = about["versions"]
    device = about.get("gpu") or about.get("cpu") or about.get("setting", {}).get("processor", "")
    count = len(about.get("cores", ()))
    cores = "" if about.get("gpu") or not count else f", {count} core{'s' * (count > 1)}"
    names = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    runs = found.get("commits") or [about["commit"] or "unknown"]  # a journal's runs have one each
    commits = f"commit{'s' * (len(runs) > 1)} {', '.join(commit[:7] for commit in runs)}"
    return f"{device}{cores}; {', '.join(names)}; {about['date'][:10]}, {commits}"


# ---- a section each --------------------------------------------------------------------------------------------------


def throughput(found: Found) -> str:
    rows = []
    for row in found["rows"]:
        speed, over = row["tokens_per_second"], row["ours_over"]
        best = row["arms"]["best"]
        how = f"{best['precision']}, {'compiled' if best['compile'] else 'eager'}, batches of {best['batch_size']}"
        rows.append([
            row["arch"], row["length"], row["processor"],
            f"{speed['ours']['median']:,.0f}", f"{speed['documented']['median']:,.0f}",
            f"{speed['best']['median']:,.0f} ({how})", spread(over["documented"]), spread(over["best"]),
            share(row["share_of_measured_ceiling"]), share((row.get("share_of_datasheet") or {}).get("ours")),
        ])  # fmt: skip
    head = ("encoder", "length", "processor", "ours, tokens/s", "Trainer as documented", "Trainer at its best",
            "ours over documented", "ours over best", "of the matrix products' speed", "of the datasheet")  # fmt: skip
    return grid(head, rows)


def race(found: Found) -> str:
    """The arms of a race, the lowest loss first; what BLiMP and GLUE say of them; the trials of Trainer's settings."""
    rows, below = [], []
    for name, arm in sorted(found["arms"].items(), key=lambda item: item[1]["loss"]["mean"]):
        runs, ends, minus = arm["runs"], arm["loss"]["interval"], arm.get("minus", {})
        tokens, steps, seconds = (sum(one[key] for one in runs) / len(runs) for key in ("tokens", "steps", "seconds"))
        loss = f"{arm['loss']['mean']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
        gain = f"{minus['mean']:+.3f}" if minus else ""
        gain += f" [{minus['low']:+.3f}, {minus['high']:+.3f}]" if "low" in minus else ""
        rows.append([
            name, len(runs), f"{tokens / 1e6:.1f}", f"{steps:,.0f}", f"{seconds:.0f}", loss, gain, minus.get("arm", ""),
        ])  # fmt: skip
        if worth := [run["downstream"] for run in runs if "downstream" in run]:
            means = {key: sum(entry[key] for entry in worth) / len(worth) for key in worth[0]}
            scores = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
            below.append(f"- {name} ({len(worth)} of the seeds): {scores}")
    head = (f"arm, {found['minutes']:g} minutes", "seeds", "tokens, M", "steps", "seconds", "held-out loss", "less",
            "that of")  # fmt: skip
    text = grid(head, rows) + ("\n\nAfter fine-tuning, and BLiMP:\n\n" + "\n".join(below) if below else "")
    if not found["trials"]:
        return text
    tried = (
        f"{trial['settings']['learning_rate']:g}, {trial['settings']['batch_size']} rows: {trial['loss']:.3f}"
        for trial in found["trials"]
    )
    return text + f"\n\nThe Trainer's rates in trials of {found['trials'][0]['minutes']:g} minutes: {'; '.join(tried)}."


def time_to_loss(found: Found) -> str:
    return race(found) + f"\n\n![loss over minutes](../benchmarks/results/{found['picture']})"


def repeats(found: Found) -> str:
    rows = [
        (row["arm"], row["seed"], *(f"{row[name]:.2f}" for name in ("all", "copy_in_sight", "no_copy")))
        for row in found["rows"]
    ]
    head = ("arm", "seed", "loss", "of rarer words with a copy in sight", "without one")
    return grid(head, rows) + f"\n\nRarer: all but the {found['frequent']} most frequent of the vocabulary."


def scaling(found: Found) -> str:
    parts = []
    if sizes := found.get("sizes"):
        rows = [
            [row["size"], f"{row['parameters'] / 1e6:.2f}", f"{row['tokens'] / 1e6:g}", f"{row['flops']:.1e}",
             f"{row['loss']:.3f}", f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "not measured"]
            for row in sorted(sizes["rows"], key=lambda row: (row["parameters"], row["tokens"]))
        ]  # fmt: skip
        head = ("layers x hidden", "parameters of the layers, M", "tokens, M", "operations", "held-out loss",
                "tokens/s")  # fmt: skip
        parts.append(grid(head, rows))
        if law := sizes["law"]:
            left = law["left_out_error"]
            parts.append(
                f"L(N, D) = {law['E']:.3f} + {law['A']:.4g} / N^{law['a']:.3f} + {law['B']:.4g} / D^{law['b']:.3f}; "
                f"a point is {left['mean']:.3f} nats off a fit to the others, at most {left['largest']:.3f}."
            )
    if two := found.get("processes"):
        one, both = (spread(two["two_over"][name], 2) for name in ("1x1", "1x2"))
        parts.append(
            f"Two processes with a thread each: {one} times the tokens/s of one with one, {both} of one with two."
        )
    if rows := found.get("data"):
        lines = [
            [row["megabytes"], row["workers"], f"{row['corpus']['seconds']:.1f}", f"{row['shards']['seconds']:.1f}",
             f"{row['corpus']['tree_mb']:.0f}", f"{row['shards']['tree_mb']:.0f}"] for row in rows
        ]  # fmt: skip
        head = ("text, MB", "workers", "corpus, s", "shards, s", "corpus, peak MB", "shards, peak MB")
        parts.append(grid(head, lines))
    return "\n\n".join(parts)


def serving(found: Found) -> str:
    parts = []
    for threads in (1, 2):
        rows = []
        for row in found["rows"]:
            if row["threads"] != threads or row.get("batch_size") != 1 or row.get("length") != 128:
                continue
            mixed = next(
                (other for other in found["rows"] if other.get("batching") == "by length" and all(
                    other[key] == row[key] for key in ("model", "kind", "asked_precision", "threads"))), {},
            )  # fmt: skip
            speed = mixed.get("texts_per_second")
            rows.append([
                row["model"], f"{row['kind']}, {row['precision']}", f"{row['ms']['median']:.2f}",
                spread(row.get("over_bert-base_in_fp32")), f"{speed['median']:,.0f}" if speed else "",
                spread(mixed.get("over_batches_in_order"), 2),
            ])  # fmt: skip
        head = (f"{threads} thread{'s' * (threads > 1)}", "run by", "1 x 128 tokens, ms",
                "times BERT-base (PyTorch, fp32)", "mixed texts/s", "over batches in order")  # fmt: skip
        parts += [grid(head, rows)] if rows else []
    one = [row for row in found["rows"] if row["threads"] == 1 and row.get("batch_size") == 1]
    return "\n\n".join([*parts, fastest(one)] if one else parts)


def fastest(rows: list[Found]) -> str:
    """Of each model at each length, the form with the least milliseconds."""
    best: dict[str, dict[int, Found]] = {}
    for row in sorted(rows, key=lambda row: -row["ms"]["median"]):
        best.setdefault(row["model"], {})[row["length"]] = row
    models, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "length"))
    lines = [
        [model, *(f"{row['ms']['median']:.2f} ({row['kind']}, {row['precision']})"
                  for row in map(best[model].__getitem__, lengths))] for model in models
    ]  # fmt: skip
    head = ("one text, one thread, ms by the fastest form", *(f"{length} tokens" for length in lengths))
    return grid(head, lines)


def staircase(found: Found) -> str:
    rows = [
        [f"{backend}: {axis}", *(spread(steps.get(power), 2) for power in ("1", "2", "4", "8", "16", "32"))]
        for backend, axes in found["backends"].items()
        for axis, steps in ((axis, value["excess"]) for axis, value in axes.items())
    ]
    head = ("time over the line through multiples of 64, less 1", *(f"multiples of {2**n}" for n in range(6)))
    return grid(head, rows) + f"\n\n![the staircase](../benchmarks/results/{found['picture']})"


def data_preparation(found: Found) -> str:
    return (
        f"{found['ours_mb_per_second']:.1f} MB/s from text to packed rows, `tokenizers.encode_batch` alone "
        f"{found['bare_mb_per_second']:.1f}, `datasets.map` {found['datasets_mb_per_second']:.1f}; ours over bare "
        f"{spread(found['ours_over_bare'], 2)} ({found['megabytes']:.0f} MB, {found['workers']} workers)."
    )


def memory(found: Found) -> str:
    rows = [
        [size, stage, f"{about['seconds']:.1f}", f"{about['tree_mb']:.0f}"]
        for size, stages in found["corpora"].items()
        for stage, about in stages.items()
        if stage != "text_mb"
    ]
    return grid(("text, MB", "stage", "seconds", "peak memory of all processes, MB"), rows)


def sparse_attention(found: Found) -> str:
    rows = [
        [row["encoder"] + " " + row["text"], row["length"], f"{row['precision']}, {row['pass']}",
         spread(row["gain"]["skipping"]), f"{row['bound_by_time']:.1f}"]
        for row in found["encoders"]
    ]  # fmt: skip
    return grid(("whole encoder", "tokens", "", "times dense", "without attention"), rows)


SECTIONS: tuple[tuple[str, str, str, Callable[[Found], str]], ...] = (
    ("Training speed against Hugging Face's Trainer", "throughput", "benchmarks/throughput.py", throughput),
    ("Serving", "serving", "benchmarks/serving.py --only table", serving),
    ("Which sizes the device likes", "staircase", "benchmarks/serving.py --only staircase", staircase),
    ("Data preparation", "data_preparation", "benchmarks/data_preparation.py", data_preparation),
    ("Memory of data preparation", "memory", "benchmarks/memory.py --stages corpus", memory),
    ("Attention that skips, whole encoders", "sparse_attention", "benchmarks/sparse_attention.py", sparse_attention),
    ("Loss at a fixed wall clock", "time_to_loss", "benchmarks/time_to_loss.py --work DIR", time_to_loss),
    ("Which parts pay", "time_to_loss_parts", "benchmarks/time_to_loss.py --work DIR --parts", time_to_loss),
    ("What the loss consists of", "repeats", "benchmarks/repeats.py --work DIR", repeats),
    ("How it scales", "scaling", "benchmarks/scaling.py --part sizes processes data --work DIR", scaling),
)
"""Heading, result file (also with an ending of MACHINES), command, renderer."""
MACHINES = ("", "_gpu", "_amd")


def markdown(results: Path = RESULTS) -> str:
    parts = [HEAD]
    for title, name, command, render in SECTIONS:
        texts = []
        for path in filter(Path.exists, (results / f"{name}{ending}.json" for ending in MACHINES)):
            found = json.loads(path.read_text())
            texts.append(f"`{path.name}`: {where(found)}\n\n{render(found)}")
        body = "\n\n".join(texts) or "Not measured yet."
        parts.append(f"## {title}\n\n`python {command}`\n\n{body}\n")
    return "\n".join(parts)


# ---- faults ----------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- written by benchmarks/tables.py -->", "<!-- end -->"


def faults(page: str, results: Path = RESULTS) -> str:
    """docs/reliability.md with the table of the last `make torture` between its two marks."""
    head, rest = page.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path, text = results / "reliability.json", "Not measured yet."
    if path.exists():
        found = json.loads(path.read_text())
        rows = [(line["fault"], line["row"], line["tried"], line["survived"], line["lost"]) for line in found["rows"]]
        text = f"`make torture SEED={found['seed']} MINUTES={found['minutes']:g}`: {where(found)}\n\n"
        text += grid(("fault", "", "tried", "survived", "lost"), rows)
        longest, most = (max(found["rows"], key=lambda line: line[name]) for name in ("longest_s", "most_mb"))
        text += f"\n\nHostile input took at most {longest['longest_s']:.1f} s a case ({longest['row']}) and "
        text += f"{most['most_mb']:,} MB ({most['row']}); a case that takes 60 s or 2 GB is lost."
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


if __name__ == "__main__":
    (ROOT / "docs" / "benchmarks.md").write_text(markdown())
    place = ROOT / "docs" / "reliability.md"
    place.write_text(faults(place.read_text()))
