"""The command line: one verb per function, no logic. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from frugalbert import run as files
from frugalbert.config import Config

EPILOG = (
    "Exit codes: 0 done, 1 a bug of ours (traceback in the run's log), 2 something you can mend, "
    "130 / 143 / 138 stopped by SIGINT / SIGTERM / SIGUSR1 after a checkpoint."
)
app = typer.Typer(
    help="A corpus, a training budget and a latency limit in; the best compact encoder that fits them out.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
File = Annotated[Path, typer.Argument(metavar="FILE_OR_RUN", help="A YAML file, or the directory of a run.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to override.")]
Directory = Annotated[Path | None, typer.Option("--dir", help="Directory of the run (default: runs/NAME).")]


def _open(file: Path, settings: list[str] | None, directory: Path | None) -> tuple[Config, Path, Path]:
    """Configuration, run directory, and the folder that its relative paths start from."""
    from frugalbert.stages import SNAPSHOT, folder_of
    from frugalbert.yamlfile import load

    if (file / SNAPSHOT).is_file():
        return load(file / SNAPSHOT, settings or ()), directory or file, folder_of(file)
    config = load(file, settings or ())
    return config, directory or Path("runs") / config.name, file.resolve().parent


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Mistakes of the user end in their sentence and exit code 2, signals in 128 + number, bugs of ours in 1."""

    @functools.wraps(verb)
    def call(*arguments: Any, **named: Any) -> None:
        try:
            verb(*arguments, **named)
        except files.Stopped as stop:
            again = " ".join(["frugalbert", *sys.argv[1:]])
            print(f"{stop}; everything so far is kept. Continue with: {again}", file=sys.stderr)
            raise typer.Exit(128 + stop.number) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (ValueError, OSError) as error:
            _log(named)
            print(f"error: {files.sentence(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except typer.Exit:
            raise
        except Exception as error:
            where = _log(named)
            print(f"internal error: {type(error).__name__}: {str(error)[:300]} (traceback: {where})", file=sys.stderr)
            raise typer.Exit(1) from None

    return call


def _log(named: dict[str, Any]) -> str:
    """The traceback goes into the run's log if there is a run, otherwise into a file of the temporary directory."""
    import tempfile

    from frugalbert.stages import SNAPSHOT, log_failure

    for key in ("directory", "file"):
        path = named.get(key)
        if isinstance(path, Path) and (path / SNAPSHOT).is_file():
            return str(log_failure(path))
    if isinstance(named.get("file"), Path) and (runs := _run_of(named["file"], named.get("settings"))):
        return str(log_failure(runs))
    return str(log_failure(Path(tempfile.gettempdir())))


def _run_of(file: Path, settings: list[str] | None) -> Path | None:
    try:
        directory = _open(file, settings, None)[1]
    except (ValueError, OSError):
        return None
    return directory if directory.is_dir() else None


@app.command()
@_guarded
def plan(file: File, settings: Settings = None, directory: Directory = None) -> None:
    """Show what `run` would do: stages done and to do, sizes, tokens, hours, disk. Changes nothing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from frugalbert.plan import rows

    config, directory, folder = _open(file, settings, directory)
    table = Table("stage", "state", "what", title=f"{config.name} in {directory}", title_justify="left")
    for row in rows(config, directory, folder):
        table.add_row(*map(escape, row))
    Console().print(table)


@app.command()
@_guarded
def run(
    file: File,
    settings: Settings = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The whole pipeline at toy size, in a run of its own.")
    ] = False,
    redo: Annotated[list[str] | None, typer.Option(help="Build this stage and what follows from it again.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Accept this stage although its settings changed.")] = None,
    directory: Directory = None,
) -> None:
    """Run the pipeline; continues wherever it stands."""
    from frugalbert import stages
    from frugalbert.rehearsal import rehearsal

    files.catch_signals()
    config, directory, folder = _open(file, settings, directory)
    if rehearse:
        config = rehearsal(config)
        directory = directory.with_name(f"{directory.name}-rehearsal")
    stages.run(config, directory, folder, only=only, redo=redo or (), keep=keep or ())
    report = directory / "report" / "report.html"
    if files.is_main_rank():
        print(report if report.exists() else directory)


@app.command()
@_guarded
def show(file: File, settings: Settings = None, directory: Directory = None) -> None:
    """Show what a run has produced: every finished stage with its figures."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from frugalbert.progress import duration, number
    from frugalbert.stages import examine

    config, directory, folder = _open(file, settings, directory)
    table = Table("stage", "took", "figure", "value", title=f"{config.name} in {directory}", title_justify="left")
    for status in examine(config, directory, folder, read_files=False):
        metrics = files.flatten((status.record or {}).get("metrics") or {})
        took = duration(status.record["seconds"]) if status.record else status.state
        for index, (name, value) in enumerate(metrics.items() if status.record else [("", "")]):
            first = (status.stage.name, took) if index == 0 else ("", "")
            table.add_row(*first, escape(name.replace("_", " ")), escape(number(value)))
    Console().print(table)


@app.command()
@_guarded
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE_OR_RUN]", help="A YAML file or a run; none: the machine alone.")
    ] = None,
    settings: Settings = None,
    quick: Annotated[bool, typer.Option("--quick", help="Compile nothing.")] = False,
    directory: Directory = None,
) -> None:
    """Look at the machine and at a run: is all there and whole, and what does the next `run` do? Changes nothing."""
    from frugalbert import doctor as checks
    from frugalbert.config import Machine

    config, where, folder = _open(file, settings, directory) if file else (None, directory or Path("runs"), Path())
    bad = 0
    for part in (
        checks.machine(where, config.machine if config else Machine(), quick=quick),
        checks.examine(config, where, folder) if config and where.is_dir() else (),
    ):
        for finding in part:
            bad += finding.state == "bad"
            print(f"{finding.state:4s}  {finding.what:14s}  {finding.text}", flush=True)
    if bad:
        print(f"error: {bad} finding{'s' * (bad > 1)} to mend", file=sys.stderr)
        raise typer.Exit(2)  # not an error of the run, in whose log it would stand


@app.command()
@_guarded
def explain(
    section: Annotated[str | None, typer.Argument(help="A section, `arch` (presets) or `curves`.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema for editors.")] = False,
) -> None:
    """Explain the YAML: all sections, or one with every key, its type, default and meaning."""
    from frugalbert import explain as pages

    print(pages.schema() if schema else pages.explain(section))


@app.command()
@_guarded
def bench(
    file: Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="Model directory, ONNX file, export or run.")],
    settings: Settings = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where a training step's time goes, of a run or YAML with shards.")
    ] = False,
) -> None:
    """Time any model by batch and length, and on texts of mixed lengths, beside stock BERT-base (`lengths=[32]` …)."""
    from frugalbert.config import Bench
    from frugalbert.measure.latency import bench_model
    from frugalbert.yamlfile import section_from

    files.catch_signals()
    if profile:
        from frugalbert import stages

        config, directory, folder = _open(file, settings, None)
        stages.profile(config, directory, folder)
        return
    bench_model(file, section_from(Bench, settings or ()))


@app.command(name="eval")
@_guarded
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model directory or a hub name.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of `finetune`, or machine.KEY=VALUE.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names and groups, joined by commas.")] = "glue",
    data: Annotated[str | None, typer.Option("--data", help="Directory of the official files; none = the hub.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write (default: evals/MODEL).")] = None,
) -> None:
    """Fine-tune and evaluate any model on a whole board: GLUE, SuperGLUE, SQuAD, RACE, BLiMP, single tasks of these."""
    from frugalbert.config import Finetune, Machine
    from frugalbert.finetune import board
    from frugalbert.yamlfile import section_from

    files.catch_signals()
    given, where = settings or [], "machine."
    own = [f"tasks=[{tasks}]", "epochs=auto", *([f"data={data}"] if data else [])]
    section = section_from(Finetune, [*own, *(setting for setting in given if not setting.startswith(where))])
    machine = section_from(Machine, [text.removeprefix(where) for text in given if text.startswith(where)])
    from frugalbert.finetune.models import title

    target = out or Path("evals") / title(model).replace("/", "-")
    board.evaluate(model, section, target, machine)
    print(target / "board.json")


@app.command()
@_guarded
def export(
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("export"),
) -> None:
    """Write any model directory as Hugging Face, ONNX and int8 files (`formats=[onnx]` …)."""
    from frugalbert.config import Export
    from frugalbert.measure.export import export_model
    from frugalbert.yamlfile import section_from

    files.catch_signals()
    export_model(file, section_from(Export, settings or ()), out)
    print(out)


@app.command()
@_guarded
def report(
    file: File,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER_DIRECTORY | SECTION.KEY=VALUE]...", help="To compare, or set.")
    ] = None,
    directory: Directory = None,
) -> None:
    """Write the HTML report of a run as it stands now; of several models (runs, or what `eval` wrote), side by side."""
    from frugalbert.config import Report
    from frugalbert.report import boards
    from frugalbert.report.page import build

    others = [Path(text) for text in settings or () if "=" not in text]
    if others or boards.is_board(file):
        html = boards.render([file, *others])
        page = (directory or (Path() if others else file)) / "comparison.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(page, html)
        print(page)
        return
    config, directory, _ = _open(file, settings, directory)
    if not directory.is_dir():
        raise ValueError(f"there is no run in {directory} yet; start it with `frugalbert run {file}`")
    (directory / "report").mkdir(exist_ok=True)
    build(config.report or Report(), {"run": directory}, directory / "report", config.machine)
    print(directory / "report" / "report.html")


@app.command()
@_guarded
def grid(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with hyperparameters and default_parameters.")],
    init_cmd: Annotated[
        str | None, typer.Option("--init-cmd", help="The command (default: deepspeed run_pretraining.py).")
    ] = None,
    job_name: Annotated[str, typer.Option("--job-name", help="Name of the job.")] = "bert_large_experiment",
    search: Annotated[Literal["grid", "random"], typer.Option(help="All combinations, or some by chance.")] = "grid",
    trials: Annotated[int, typer.Option(min=1, help="How many with --search random.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of --search random.")] = 0,
    style: Annotated[
        Literal["reference", "ours"], typer.Option(help="`--key value`, or `section.key=value` as our verbs take it.")
    ] = "reference",
    form: Annotated[
        Literal["lines", "shell", "slurm", "json"], typer.Option("--format", help="One a line, a script, JSON.")
    ] = "lines",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; without it they are printed.")] = None,
) -> None:
    """Turn a file of hyper-parameter values (academic-budget-bert's format) into one command per combination."""
    from frugalbert import grid as jobs

    read = jobs.read(file)
    chosen = jobs.settings(read, search, trials, seed)
    text = jobs.write(jobs.commands(read, chosen, jobs.Form(style, init_cmd, job_name)), form, job_name)
    if out is None:
        print(text, end="")
    else:
        jobs.save(out, text, form)
        print(out)


@app.command()
@_guarded
def submit(
    file: Annotated[Path, typer.Argument(metavar="RUN_OR_EVAL_DIR", help="Where predictions of the test sets are.")],
    board: Annotated[Literal["glue", "superglue", "squad", "race"], typer.Option(help="Whose server.")],
    partial: Annotated[bool, typer.Option("--partial", help="Tasks may be missing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Zip to write; a directory for squad and race.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Validate the file given instead, and write nothing.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="With --check --board squad: evaluate on this official file.")
    ] = None,
) -> None:
    """Write what a test server takes, or say all that is wrong; `--check FILE` validates anyone's."""
    from frugalbert.finetune import submission

    if check:
        print(submission.check(file, board, partial, data))
    else:
        for path in submission.submit(file, board, partial, out):
            print(path)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress lines take their place
    app()


if __name__ == "__main__":
    main()
