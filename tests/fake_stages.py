"""Stage functions for tests of the runner: they count their calls and leave a file that depends on their inputs."""

from pathlib import Path


def build(section, inputs, out, machine):
    calls = out.parent / f"{out.name}.calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    upstream = [(path / "result").read_text() for name, path in sorted(inputs.items()) if name not in ("yaml", "run")]
    (out / "result").write_text(f"{out.name}({', '.join(upstream)})")
    return {"inputs": len(upstream)}


def fail(section, inputs, out, machine):
    (out / "half").write_text("half")
    raise ValueError("texts/: there is no text here; give a directory with .txt files")


def calls(directory: Path, stage: str) -> int:
    path = directory / f"{stage}.calls"
    return len(path.read_text()) if path.exists() else 0
