"""The page as a whole: complete and partial runs; nothing hostile, secret or from outside gets through."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from frugalbert.config import Machine, Report
from frugalbert.report import tables
from frugalbert.report.collect import collect
from frugalbert.report.page import build, render
from frugalbert.report.wording import clean
from tests.faults import rows
from tests.report.conftest import TEXTS, dump, make_run

PAYLOADS = (
    "<script>alert(1)</script>", "<SCRIPT SRC=//evil.example/x.js>", '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>", "</title><script>x()</script>", "</style><script>x()</script>",
    "</pre></code><b>x", "</script><script>x()</script>", '{"a": "</script><script>x()//"}', "javascript:alert(1)",
    '" onmouseover="alert(1)', "' autofocus onfocus='alert(1)", "<svg onload=alert(1)>",
    "<svg><script>x()</script></svg>",
    "</svg><img src=x>", "]]><!--<img src=x>", "<!--", "<a href=javascript:x()>x</a>", "<iframe src=//evil.example>",
    "&lt;script&gt;&#60;b&#62;", "{{ 7 * 7 }}{% raw %}", "$\\alpha_{1}$ %s", "pay\u202etxt.exe",
    "a\u200bb\u0000c\u0007d",
    "<base href=//evil.example><meta http-equiv=refresh>",
)  # fmt: skip
TAGS = set(
    "html head meta title style body header main aside section nav footer p h1 h2 h3 ul li dl dt dd div span bdi b "
    "strong a code pre figure figcaption table caption thead tbody tr th td details summary "
    "svg g defs path use text rect clippath img".split()
)
ATTRIBUTES = set(
    "lang charset content http-equiv name class id href role aria-label aria-labelledby aria-hidden tabindex scope "
    "viewbox d x y width height transform clip-path src alt".split()
)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):  # the only void elements of the page
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(html: str) -> Page:
    """Parse a page and hold it to the rules every page must keep."""
    page = Page(html)
    assert page._open == []
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    identifiers = {value for _, name, value in page.attributes if name == "id"}
    assert len(identifiers) == sum(name == "id" for _, name, _ in page.attributes)
    for tag, name, value in page.attributes:
        if name == "href":
            assert value[0] == "#", value
            assert value[1:] in identifiers, value
        elif name == "clip-path":
            assert value[5:-1] in identifiers, value
        elif name == "src":
            assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", value), value
        elif name not in ("aria-label", "alt") and tag != "meta":
            assert re.fullmatch(r"[\w .,()#-]*", value), (tag, name, value)
    assert "url(" not in page.style
    assert "@import" not in page.style
    return page


# ---- security -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S6")
@pytest.mark.parametrize("number", range(len(PAYLOADS)))
def test_payloads_are_text_wherever_they_come_from(number: int, tmp_path: Path, case: rows.Tally):
    payload = PAYLOADS[number]
    run = make_run(tmp_path / "run", {place: f"{payload}~{place}" for place in TEXTS}, steps=0)
    page = read(render(run))
    for place in TEXTS:
        with case():
            assert " ".join(clean(f"{payload}~{place}").split()) in page.text, place


@pytest.mark.fault("S6")
def test_payloads_in_the_title_the_directory_and_broken_files(tmp_path: Path):
    run = make_run(tmp_path / "x\u202e<img src=x onerror=alert(1)>", steps=0)
    (run / "run.yaml").unlink()
    dump(run / "finetune" / "results.json", {"<script>": "<script>"})
    (run / "export" / "export.json").write_text('{"<img src=x>": ')
    page = read(render(run, "</title><script>alert(1)</script>"))
    assert "</title><script>alert(1)</script> · frugalbert report" in page.text
    assert "finetune/results.json does not hold what it should" in page.text
    assert "export/export.json cannot be read" in page.text


def test_the_check_itself_can_fail():
    for bad in (
        "<p onclick='x()'>", "<img src='x.png'>", "<video>", "<p class='\"><b'></p>",
        '<a href="https://x.example">x</a>', "<b></p>",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            read(bad)


def test_nothing_but_its_own_style_is_allowed(finished_page: str):
    page = read(finished_page)
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert "unsafe" not in policy


TOKENS = (
    "hf_AbCdEfGhIjKlMnOpQrStUvWx", "github_pat_11ABCDEFG0abcdefghij", "sk-proj-abcdefghijklmnop1234",
    "AKIAIOSFODNN7EXAMPLE", "aZ3" * 12,
)  # fmt: skip


@pytest.mark.fault("S10")
def test_tokens_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_TOKEN", "an-odd-looking-secret")
    secrets = [*TOKENS, "0123456789abcdef0123456789abcdef01234567", "an-odd-looking-secret"]
    run = make_run(tmp_path / "run", {place: " ".join(secrets) for place in TEXTS}, steps=0)
    with open(run / "run.yaml", "a", encoding="utf-8") as file:
        file.write('notes: {api_key: tiny, password: "two words", wandb_token: abc}\nurl: https://me:pass@host/x\n')
    html = render(run, f"title {TOKENS[0]}")
    for secret in [*secrets, "tiny", "two words", "abc}", "me:pass"]:
        assert secret not in html
    assert "vocab_size: 8192" in html


@pytest.mark.fault("S10")
def test_private_paths_of_the_snapshot_stay_out(finished_page: str):
    assert "/home/someone" not in finished_page


# ---- content --------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_what_it_should(finished_page: str):
    text = read(finished_page).text.replace("\u00a0", " ")
    for words in (
        "quickstart",
        "Held-out loss 3.42 nats per masked token is below the bigram baseline 4.87 and the unigram baseline 6.04.",
        "python-docs: accuracy 62.4 ± 0.7 over 3 seeds; beats random initialisation by 17.1 points (95 % interval 11.4 "
        "to 22.7).",
        "1.24 ms median for batch 1 × 128 tokens, 1 CPU thread: 56.0 × as fast as BERT-base in PyTorch",
        "Training waited for data 0.4 % of its step time.",
        "Step 1,000: step skipped: loss nan, gradient norm nan.",
        "learning_rate: 0.003",
        "61,465",
        "58.8 % of the ceiling",
        "64,890",
        "AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)",
        "frugalbert run quickstart.yaml",
        "transformers 5.23.0",
    ):
        assert words in text, words
    assert "not complete" not in text
    assert finished_page.count("<svg ") == 10  # loss twice, throughput, two bars, dots, four settings of latency
    assert finished_page.count('role="img" aria-label="') == 10


def test_random_weights_are_only_spoken_of_where_they_were_tried(finished_page: str, tmp_path: Path):
    assert "once from random ones" in read(finished_page).text
    run = make_run(tmp_path / "run", steps=0)
    rows = json.loads((run / "finetune" / "results.json").read_text())
    dump(run / "finetune" / "results.json", [
        {key: value for key, value in row.items() if key != "gain"} for row in rows if row["init"] != "random"
    ])  # fmt: skip
    page = render(run)
    tuning = page[page.index('<section id="tuning"') :].split("</section>")[0]
    assert "once from random ones" not in read(page).text
    assert "finetune.random_baseline" in tuning
    assert ">random" not in tuning


def test_the_environment_names_the_machine(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=20)
    assert tables.environment(collect(run))[0][:3] == [("CPU", "AMD EPYC 9B45"), ("threads", "2"), ("ranks", "1")]
    summary = json.loads((run / "pretrain" / "summary.json").read_text())
    dump(run / "pretrain" / "summary.json", {**summary, "device": "NVIDIA H200", "cpu": "Another", "threads": 8})
    assert tables.environment(collect(run))[0][:4] == [
        ("device", "NVIDIA H200"), ("CPU", "Another"), ("CPU of the timings", "AMD EPYC 9B45"), ("threads", "8"),
    ]  # fmt: skip


def test_the_sizes_that_were_weighed_are_shown(tmp_path: Path):
    run = make_run(tmp_path / "run")
    rows = [
        {"arch": "modern 2x128", "encoder_parameters": 4e5, "tokens_per_second": 5e4, "timed": True, "tokens": 4e7,
         "foretold_loss": 3.61},
        {"arch": "modern 4x256", "encoder_parameters": 3e6, "tokens_per_second": 2e4, "timed": True, "tokens": 2e7,
         "foretold_loss": 3.4, "latency_ms": 4.25},
        {"arch": "modern 8x512", "timed": False, "tokens": 1e6, "foretold_loss": 4.0}, {"arch": 7, "timed": True},
    ]  # fmt: skip
    dump(run / "pretrain" / "sizing.json", {"chosen": "modern 4x256", "rows": rows, "unique_tokens": 1e7})
    page = render(run)
    for cell in ("Sizes weighed for the budget", "modern 4x256 (chosen)", "+0.210", "+0.000", "2.00"):
        assert cell in page, cell
    assert "8x512" not in page
    assert "Sizes weighed" not in render(make_run(tmp_path / "other"))


def test_the_same_files_give_the_same_page(tmp_path: Path):
    for folder in ("a", "b"):
        make_run(tmp_path / folder / "run", steps=50)
    assert render(tmp_path / "a" / "run") == render(tmp_path / "b" / "run")


def test_the_stage_writes_one_file(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    (tmp_path / "out").mkdir()
    figures = build(Report(title="A title"), {"run": run}, tmp_path / "out", Machine())
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert figures == {"file": "report.html", "bytes": len(html.encode())}
    assert "<h1><bdi>A title</bdi></h1>" in html


def test_an_empty_run_says_what_is_missing(tmp_path: Path):
    text = read(render(tmp_path)).text
    for stage in ("Corpus", "Tokenizer", "Shards", "Pre-training", "Fine-tuning", "Export", "Latency"):
        assert f"{stage} has not run." in text


def test_a_half_done_run_is_shown_as_far_as_it_got(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=100)
    for path in ("pretrain/stage.json", "pretrain/summary.json", "finetune/stage.json", "finetune/results.json"):
        (run / path).unlink()
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "bench")
    metrics = run / "pretrain" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[: 1 + metrics.stat().st_size // 2])
    text = read(render(run)).text.replace("\u00a0", " ")
    assert "Pre-training has not finished (51 % of the budget so far)." in text
    assert "Fine-tuning has not finished (6 trials so far)." in text
    assert "Export has not run." in text
    assert "Loss (nats per masked token)" in text
    assert "Damaged files" not in text


def test_only_what_the_configuration_asks_for_is_missed(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("name: small\ncorpus: {sources: [a]}\n")
    text = read(render(tmp_path)).text
    assert "Corpus has not run." in text
    assert "Latency" not in text


def test_kept_drifts_are_flagged(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    record = json.loads((run / "shards" / "stage.json").read_text())
    dump(
        run / "shards" / "stage.json",
        {**record, "accepted": {"fingerprint": "x", "drift": ["shards.length: 128 -> 64"]}},
    )
    text = read(render(run)).text
    assert "Kept although settings changed" in text
    assert "Shards: shards.length: 128 -> 64" in text


def test_stages_of_other_versions_are_flagged(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    record = json.loads((run / "bench" / "stage.json").read_text())
    dump(run / "bench" / "stage.json", {**record, "versions": {**record["versions"], "torch": "2.11.0"}})
    assert "torch differs between stages: 2.13.0+cpu (Corpus, Tokenizer" in read(render(run)).text


def test_a_page_about_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is no run directory"):
        render(tmp_path / "nowhere")
