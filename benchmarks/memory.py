"""Memory of data preparation: the peak of each stage for a corpus of 100 MB and for one of 400 MB, in one run.

English articles (WikiExtractor output, xz) in files of 25 MB, two workers. Where the corpus is larger than the text,
the articles come again with the words of each line in rotated order, so that nothing is dropped as a duplicate. Every
stage runs in a process of its own and is watched with all its children, twenty times a second. Two peaks are kept:
  tree      the largest sum of resident memory over the process and its children (pages they share count in each)
  process   the largest resident memory of any single one of them, by the system's own account (`ru_maxrss`)
The bar is for the corpus stage: at most 1.3 times as much for four times the text.

  python benchmarks/memory.py --megabytes 100 400
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STAGES = ("corpus", "tokenizer", "shards")
FILE_BYTES = 25_000_000
BAR = 1.3


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=[str(path) for path in sorted(data.glob("enwiki*.xz"))])
    parser.add_argument("--megabytes", type=int, nargs=2, default=(100, 400), help="sizes of the two corpora")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="the first ones are enough")
    parser.add_argument("--dedup", choices=("exact", "near", "none"), default="exact")
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "memory.json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # a child: run it in --folder
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def articles(files: list[str]) -> Iterator[bytes]:
    """`<doc …>` blocks without end: all files, then all again with every line's words rotated by one more place."""
    for turn in count():
        for name in files:
            with lzma.open(name) as stream:
                block: list[bytes] = []
                for line in stream:
                    words = line.split(b" ")
                    turned = turn and not line.startswith((b"<doc ", b"</doc>")) and len(words) > 2
                    cut = turn % len(words)
                    block.append(
                        b" ".join([*words[cut:-1], words[-1].strip(), *words[:cut]]) + b"\n" if turned else line
                    )
                    if line.startswith(b"</doc>"):
                        yield b"".join(block)
                        block = []


def write_text(files: list[str], folder: Path, megabytes: int) -> int:
    """Files of FILE_BYTES in `folder/text`; returns how many bytes there are."""
    (folder / "text").mkdir(parents=True)
    total, source = 0, articles(files)
    while total < megabytes * 1e6:
        with open(folder / "text" / f"wiki_{total // FILE_BYTES:02d}", "wb") as file:
            while file.tell() < min(FILE_BYTES, megabytes * 1e6 - total):
                file.write(next(source))
            total += file.tell()
    return total


def work(options: argparse.Namespace) -> None:
    """The child: one stage, then its largest process on standard output."""
    from frugalbert.config import Corpus, Machine, Shards, Tokenizer
    from frugalbert.data import corpus, shards, tokenizer

    folder = options.folder
    inputs = {"yaml": folder, "corpus": folder / "corpus", "tokenizer": folder / "tokenizer"}
    machine = Machine(workers=options.workers)
    (folder / options.stage).mkdir()
    if options.stage == "corpus":
        found = corpus.build(Corpus(sources=("text",), dedup=options.dedup), inputs, folder / "corpus", machine)
    elif options.stage == "tokenizer":
        found = tokenizer.build(Tokenizer(vocab_size=options.vocab_size), inputs, folder / "tokenizer", machine)
    else:
        found = shards.build(Shards(), inputs, folder / "shards", machine)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"process_mb": max(peaks) * 1024 / 1e6, "found": found}))


def measure(options: argparse.Namespace, folder: Path, stage: str) -> dict[str, Any]:
    """Peaks and seconds of one stage, in a child that is watched while it works."""
    import psutil

    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--workers", str(options.workers)]
    command += ["--dedup", options.dedup, "--vocab-size", str(options.vocab_size)]
    started, peak, samples = time.perf_counter(), 0, 0
    with open(folder / f"{stage}.log", "wb") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        root = psutil.Process(child.pid)
        while child.poll() is None:
            total = 0
            for process in [root, *_children(root)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak, samples = max(peak, total), samples + 1
            time.sleep(0.05)
    if child.returncode or child.stdout is None:
        raise ValueError(f"{stage}: {(folder / f'{stage}.log').read_text().strip().splitlines()[-1]}")
    said = json.loads(child.stdout.read())
    seconds = round(time.perf_counter() - started, 1)
    return {
        "tree_mb": peak / 1e6,
        "process_mb": said["process_mb"],
        "seconds": seconds,
        "samples": samples,
        **_small(said),
    }


def _children(root: Any) -> list[Any]:
    import psutil

    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _small(said: dict[str, Any]) -> dict[str, Any]:
    wanted = ("documents", "dropped", "vocab_size", "tokens")
    return {key: said["found"][key] for key in wanted if key in said["found"]}


def main() -> None:
    options = parse()
    if options.stage:
        try:
            work(options)
        except ValueError as error:
            sys.exit(str(error))
        return
    from evidence import told  # not in the child, whose memory is measured

    with told():
        study(options)


def study(options: argparse.Namespace) -> None:
    from throughput import environment, save

    if not options.files:
        raise ValueError("no articles: set FRUGALBERT_DATA, or give --files")
    peaks: dict[str, dict[str, Any]] = {}
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            entry: dict[str, Any] = {"text_mb": write_text(options.files, folder, megabytes) / 1e6}
            for stage in options.stages:
                entry[stage] = measure(options, folder, stage)
            peaks[str(megabytes)] = entry
    small, large = (peaks[str(megabytes)] for megabytes in options.megabytes)
    kinds = ("tree_mb", "process_mb")
    ratios = {stage: {kind: large[stage][kind] / small[stage][kind] for kind in kinds} for stage in options.stages}
    result = {
        "what": "peak resident memory of each stage by the size of the corpus, MB; ratio large to small",
        "workers": options.workers,
        "dedup": options.dedup,
        "corpora": peaks,
        "ratios": ratios,
        "bar": {"stage": "corpus", "at_most": BAR, "met": max(ratios["corpus"].values()) <= BAR},
        "machine": environment(),
    }
    save(options.out, result)
    print(f"{'stage':<10} {'kind':<11} " + " ".join(f"{f'{size} MB':>9}" for size in options.megabytes) + "  ratio")
    for stage in options.stages:
        for kind in kinds:
            figures = " ".join(f"{entry[stage][kind]:>9.0f}" for entry in (small, large))
            print(f"{stage:<10} {kind.removesuffix('_mb'):<11} {figures}  {ratios[stage][kind]:.2f}")


if __name__ == "__main__":
    main()
