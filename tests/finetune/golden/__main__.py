"""`python -m tests.finetune.golden` writes the golden files anew; read their difference before committing it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.finetune.golden import dump

with tempfile.TemporaryDirectory() as folder:
    texts = dump.everything(Path(folder))
data = Path(os.environ.get("FRUGALBERT_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
if data.is_dir():
    texts["real.txt"] = dump.real(data)
for name, text in texts.items():
    (dump.FOLDER / name).write_text(text, encoding="utf-8")
    print(dump.FOLDER / name)
