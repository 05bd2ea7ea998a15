"""One arm of `time_to_loss.py`: a process of its own, from its start to a model on disk, and what that model is worth.

In: the moment the process was started (time.time()) and a folder with task.json. Out, below the folder: the model, its
weights at points of the clock, and result.json. Arms of ours are the stage `pretrain` itself; arms of the Trainer do
what transformers' examples/pytorch/language-modeling/run_mlm.py does after tokenising: BertForMaskedLM,
DataCollatorForLanguageModeling, Trainer. Losses are taken after the clock, by one function for all.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert.run import read_json, write_json  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

MARKERS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Shares of the clock at which weights are kept for the curve, in every arm."""
LENGTH, ROWS, CURVE_ROWS = 128, 2048, 128
"""Of the held-out rows; their masks are those of the product's own validation."""
TASKS = ("sst2", "stsb", "blimp")
CLOSING = 1.0  # seconds kept for what ours does after its last step: writing the weights
PROBE = (3.0, 30.0, 0.05)  # seconds of a probe: at least, at most, share of the clock


def main() -> None:
    if len(sys.argv) != 3:
        print("one arm of benchmarks/time_to_loss.py, which starts it")
        return
    started, out = float(sys.argv[1]), Path(sys.argv[2])
    task = read_json(out / "task.json")
    found = (with_trainer if "trainer" in task else with_ours)(task, out, started)
    if not task.get("probe"):
        found |= measured(task, out, started)
    write_json(out / "result.json", found)


# ---- ours ------------------------------------------------------------------------------------------------------------


def with_ours(task: dict[str, Any], out: Path, started: float) -> dict[str, Any]:
    """The stage `pretrain` for what is left of the clock."""
    from frugalbert.config import Machine, Pretrain
    from frugalbert.train import pretrain

    values = dict(task["pretrain"])
    values["checkpoints"] = {"markers": MARKERS, **values.get("checkpoints", {})}
    values["validation"] = {"rows": CURVE_ROWS, "every": 0.25, "begin_every": 0.05, "end_every": 0.0}
    inputs = {name: Path(task["data"]) / name for name in ("shards", "tokenizer")} | {"yaml": out}
    (out / "pretrain").mkdir()
    budget = f"{60 * task['minutes'] - CLOSING - (time.time() - started):.2f}s"
    section = Pretrain.model_validate({**values, "budget": budget, "seed": task["seed"]})
    pretrain.build(section, inputs, out / "pretrain", Machine(device=task["device"]))
    summary = read_json(out / "pretrain" / "summary.json")
    kept = ("tokens", "steps", "tokens_per_second", "cost_seconds", "precision", "micro_batch", "compile")
    return {name: summary[name] for name in kept}


# ---- Hugging Face's Trainer ------------------------------------------------------------------------------------------


class Rows:
    """A map-style data set of the training rows (N, length) without padding, as run_mlm's `group_texts` makes them."""

    def __init__(self, ids: np.ndarray, special: list[int]) -> None:
        self.ids, self.special = ids, special

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Any]:
        import numpy as np

        row = self.ids[number].astype(np.int64)
        return {"input_ids": row.tolist(), "special_tokens_mask": np.isin(row, self.special).astype(np.int64).tolist()}


def full_rows(shards: Path, length: int) -> Rows:
    """The training rows of `length` tokens that have no padding."""
    from frugalbert.data.rows import ShardSet

    found = ShardSet.open(shards, length, "train")
    ids = found.ids
    return Rows(ids[(ids != found.special["pad"]).all(1)], found.special["all"])


def arguments(task: dict[str, Any], out: Path) -> Any:
    """run_mlm's TrainingArguments. What is not in the task's `trainer` is as transformers has it."""
    from transformers import TrainingArguments

    told = task["trainer"]
    steps = max(1, math.floor(task["speed"]["steps_in_time"])) if "speed" in task else 0  # 0: three epochs
    return TrainingArguments(
        str(out / "trainer"),
        per_device_train_batch_size=told["batch_size"],
        learning_rate=told["learning_rate"],
        max_steps=steps or -1,
        warmup_steps=round(told["warmup"] * steps),
        weight_decay=told["weight_decay"],
        bf16=told["bf16"],
        torch_compile=told["compile"],
        remove_unused_columns=told["remove_unused_columns"],
        dataloader_num_workers=told["workers"],
        save_strategy="steps" if told["save_steps"] else "no",
        save_steps=told["save_steps"] or 500,
        save_total_limit=1,
        use_cpu=task["device"] == "cpu",
        seed=task["seed"],
        report_to=[],
        disable_tqdm=True,
    )


def with_trainer(task: dict[str, Any], out: Path, started: float) -> dict[str, Any]:
    """run_mlm after its tokenising: model, collator, Trainer; ended by the clock if its steps do not end before."""
    from trainer_arms import stock
    from transformers import DataCollatorForLanguageModeling, Trainer, set_seed

    from frugalbert.data import tokenizer as tokenizers
    from frugalbert.data.masking import Vocabulary

    told, data = task["trainer"], Path(task["data"])
    set_seed(task["seed"])
    names = tokenizers.load(data / "tokenizer")
    rows = full_rows(data / "shards", told["length"])
    model = stock(told["arch"], Vocabulary.from_tokenizer(names).size, told["dropout"])
    watch = keeper(task, out / "pretrain", started, model)
    trainer = Trainer(
        model=model, args=arguments(task, out), train_dataset=rows, callbacks=[watch],  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(names, mlm_probability=0.15),
    )  # fmt: skip
    trainer.train()
    ended = time.time()
    model.save_pretrained(out / "pretrain" / "model")
    names.save_pretrained(out / "pretrain" / "model")
    ticks, tokens = watch.ticks, told["batch_size"] * told["length"]
    first = min(2, len(ticks) - 1)  # the steps before it warm up
    startup, closing = ticks[first] - started, time.time() - ended + CLOSING / 4
    step = (ticks[-1] - ticks[first]) / (len(ticks) - 1 - first) if len(ticks) > first + 1 else startup
    found = {"steps": len(ticks), "tokens": len(ticks) * tokens, "tokens_per_second": tokens / step}
    found |= {"startup": startup, "closing": closing, "step": step}
    if task.get("probe"):
        found["steps_in_time"] = first + 1 + (60 * task["minutes"] - startup - closing) / step
    rate = trainer.lr_scheduler.get_last_lr()[0]  # type: ignore[union-attr]
    return found | {"rate_left": rate / told["learning_rate"]}


def keeper(task: dict[str, Any], out: Path, started: float, model: Any) -> Any:
    """A callback that notes when steps end, keeps weights at the markers, and ends the training with the clock."""
    import torch
    from transformers import TrainerCallback

    seconds = 60.0 * task["minutes"]
    probe = min(max(PROBE[0], PROBE[2] * seconds), PROBE[1]) if task.get("probe") else None
    end = seconds - (CLOSING if task.get("speed") is None else task["speed"]["closing"])

    class Keeper(TrainerCallback):
        ticks: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if probe is not None and task["device"] == "cuda":
                torch.cuda.synchronize()
            now = time.time()
            self.ticks.append(now)
            if probe is not None:
                control.should_training_stop = len(self.ticks) >= 5 and now - self.ticks[1] >= probe
                return
            passed = [marker for marker in MARKERS if now - started >= marker * seconds]
            if passed and not (path := out / "markers" / f"progress-{passed[-1]:.2f}").exists():
                model.save_pretrained(path)
            control.should_training_stop = control.should_training_stop or now - started >= end

    return Keeper()


# ---- what it is worth ------------------------------------------------------------------------------------------------


def measured(task: dict[str, Any], out: Path, started: float) -> dict[str, Any]:
    """Held-out loss of the final model and along the clock; when each lay on the disk. The markers are removed."""
    from frugalbert.config import Machine
    from frugalbert.dist import pick_device

    device = pick_device(Machine(device=task["device"]))
    final = out / "pretrain" / "model"
    seconds = written(final) - started
    curve = []
    for path in sorted((out / "pretrain" / "markers").glob("progress-*")):
        loss = held_out(path, task, device, CURVE_ROWS)["loss"]
        curve.append([round((written(path) - started) / 60, 4), round(loss, 5)])
    end = held_out(final, task, device, CURVE_ROWS)["loss"]
    curve.append([round(seconds / 60, 4), round(end, 5)])
    for name in ("markers", "checkpoints"):
        shutil.rmtree(out / "pretrain" / name, ignore_errors=True)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return {**held_out(final, task, device, ROWS), "curve": curve, "seconds": round(seconds, 2)}


def written(model: Path) -> float:
    return (model / "model.safetensors").stat().st_mtime


def held_out(model: Path, task: dict[str, Any], device: Any, rows: int) -> dict[str, float]:
    """Mean loss and accuracy at 15 % masks, in fp32: the same held-out rows and masks for all, ours or stock."""
    import torch

    net, objective, text = opened(model, task, device, rows)
    with torch.no_grad():
        found = text.measure(lambda batch: objective.score(net, batch), 64, lambda: None)
    return {"loss": found["validation_loss"], "accuracy": found["validation_accuracy"]}


def opened(model: Path, task: dict[str, Any], device: Any, rows: int) -> tuple[Any, Any, Any]:
    """A model, what scores it, and the held-out rows. It sees them as it was trained to: only its document, or, as
    run_mlm does, the whole row."""
    from frugalbert.data import tokenizer as tokenizers
    from frugalbert.data.masking import Vocabulary
    from frugalbert.model.modeling import FrugalForMaskedLM
    from frugalbert.train.batches import HeldOut
    from frugalbert.train.objectives import MaskedLM
    from frugalbert.train.weights import load_model

    data = Path(task["data"])
    vocabulary = Vocabulary.from_tokenizer(tokenizers.load(data / "tokenizer"))
    net = load_model(str(model), "model", model, FrugalForMaskedLM, vocabulary, whole=True).to(device).eval()
    isolate = "trainer" not in task and task["pretrain"].get("isolate_documents", True)
    return net, MaskedLM(isolate), HeldOut(data / "shards", LENGTH, vocabulary.to(device), rows)


def scores(folder: Path, device: str) -> dict[str, Any]:
    """The headline scores of a run's model: three seeds a task, 2,000 examples, one recipe for both kinds of model.

    BERT's classifier reads its pooler, as in transformers; that of our family `modern`, which has none, the mean.
    """
    from evidence import DATA
    from pretrained_vs_random import with_pooling

    from frugalbert.config import Finetune, Machine
    from frugalbert.finetune import board

    values = {"tasks": TASKS, "seeds": (0, 1, 2), "data": str(DATA), "learning_rate": 5e-4, "epochs": 5.0,
              "max_train_examples": 2000, "blimp_pairs": 50, "random_baseline": False}  # fmt: skip
    model = with_pooling(folder / "pretrain" / "model", "mean", folder / "downstream")
    out = folder / "downstream" / "board"
    board.evaluate(str(model), Finetune.model_validate(values), out, Machine(device=device))  # type: ignore[arg-type]
    found = read_json(out / "board.json")
    rows = {row["task"]: row["mean"] for row in found["rows"]}
    return rows | {"blimp": found["blimp"]["pretrained"]["accuracy"]}


if __name__ == "__main__":
    main()
