"""The built-in task: where its examples come from, what is hidden in them, and that nothing leaks."""

from __future__ import annotations

import random
from collections import Counter, namedtuple
from pathlib import Path

import pytest

from frugalbert import config
from frugalbert.data import corpus
from frugalbert.finetune import python_docs
from frugalbert.finetune.examples import load
from frugalbert.finetune.tasks import resolve

Document = namedtuple("Document", "text source held_out")
SIZES = {"numpy": 60, "torch": 50, "pandas": 40, "attr": 30, "rare": 4}
WORDS = "array axis returns value frame index tensor column mean given input shape of the for each".split()


def documents() -> list[Document]:
    generator = random.Random(0)
    found = []
    for package, size in SIZES.items():
        for number in range(size):
            text = f"{package.upper()} {' '.join(generator.choices(WORDS, k=9))}.\n\nSee {package}.x{number} for more."
            found.append(Document(text, f"python-docs/{package}", number % 4 == 0))
    found += [Document("Return self.", "python-docs/torch", False)] * 3
    found += [Document("a sentence of another source altogether", "data/wiki.txt", False)] * 100
    found.append(Document(found[1].text, "python-docs/numpy", True))  # also in training
    found.append(Document("the same six words in both packages", "python-docs/numpy", True))
    found.append(Document("the same six words in both packages", "python-docs/torch", False))
    return found


@pytest.fixture
def stored(monkeypatch):
    def read(folder, split, files=None):
        return (document for document in documents() if document.held_out == (split == "held_out"))

    monkeypatch.setattr(corpus, "read_documents", read)


def load_task(**settings):
    section = config.Finetune(tasks=["python-docs"], model="unused", **settings)
    return load(resolve(section.tasks)[0], section, Path(), Path("corpus"))


def test_training_documents_train_and_held_out_ones_evaluate(stored):
    data = load_task()
    assert data.labels == ("attr", "numpy", "pandas", "torch")  # `rare` has too few
    held_out = {
        python_docs.pattern(data.labels).sub("thing", python_docs.beginning(d.text)) for d in documents() if d.held_out
    }
    assert {example.text for example in data.dev} <= held_out
    assert not {example.text for example in data.dev} & {example.text for example in data.train}
    assert Counter(example.label for example in data.dev) == {0: 8, 1: 15, 2: 10, 3: 13}
    assert Counter(example.label for example in data.train) == {0: 22, 1: 45, 2: 30, 3: 37}


def test_texts_of_two_packages_and_short_ones_are_left_out(stored):
    texts = [example.text for data in [load_task()] for example in data.train + data.dev]
    assert "the same six words in both packages" not in texts
    assert "Return self." not in texts
    assert len(set(texts)) == len(texts)
    assert not any(name in text.lower() for text in texts for name in SIZES if name != "rare")


def test_training_is_balanced_and_the_same_for_every_order(stored, monkeypatch):
    data = load_task(max_train_examples=24)
    assert Counter(example.label for example in data.train) == dict.fromkeys(range(4), 6)
    shuffled = documents()
    random.Random(1).shuffle(shuffled)
    monkeypatch.setattr(
        corpus, "read_documents", lambda folder, split: (d for d in shuffled if d.held_out == (split != "train"))
    )
    again = load_task(max_train_examples=24)
    assert (again.train, again.dev) == (data.train, data.dev)


def test_a_corpus_without_docstrings_is_refused(monkeypatch):
    monkeypatch.setattr(corpus, "read_documents", lambda folder, split: iter(documents()[-101:-4]))
    with pytest.raises(ValueError, match="0 packages of the corpus have .*raise corpus.held_out"):
        load_task()
    section = config.Finetune(tasks=["python-docs"], model="unused")
    with pytest.raises(ValueError, match="add corpus: {sources:"):
        load(resolve(section.tasks)[0], section, Path(), None)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("A NumPy array, np.array or numpy.ndarray", "A thing array, thing.array or thing.ndarray"),
        ("input and snapping NP-hard numpydoc", "input and snapping thing-hard thingdoc"),
        ("PyTorch's torch_dtype, TorchScript, torch.nn", "thing's thing_dtype, thingScript, thing.nn"),
        ("scikit-learn, sklearn and scikit_learn", "thing, thing and thing"),
        ("import matplotlib.pyplot as plt; plt.show", "import thing.thing as thing; thing.show"),
        ("the huggingface-hub or huggingface_hub by Hugging Face", "the thing or thing by thing"),
        ("pd.DataFrame, pandas; updated", "thing.DataFrame, thing; updated"),
    ],
)
def test_every_form_of_a_name_is_hidden(text, hidden):
    packages = ("huggingface_hub", "matplotlib", "numpy", "pandas", "sklearn", "torch")
    assert python_docs.pattern(packages).sub("thing", text) == hidden


def test_short_names_are_hidden_as_words_only():
    assert (
        python_docs.pattern(("attr",)).sub("thing", "attr attribute _attr ATTR.s") == "thing attribute _thing thing.s"
    )


def test_a_text_is_its_first_paragraphs():
    assert python_docs.beginning("One\n  line.\n\nAnother.\n") == "One line. Another."
    limit = python_docs.MAX_CHARACTERS
    assert python_docs.beginning("First.\n\n" + "x" * limit) == "First."
    assert len(python_docs.beginning("x" * 5000)) == limit
