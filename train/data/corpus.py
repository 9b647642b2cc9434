"""Corpora as TensorFlow-free tfds datasets of whole documents, cached by their content."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from train.data import sources
from train.data.cache import cache_root, locked
from train.data.sources import Document

CORPORA = "python_stdlib, python_packages or text:PATH"


class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """tfds builder of ``{path, text}`` examples in path order, from a collection.

    Its data folder is named by the collection's fingerprint, so a changed source is a new
    dataset; the metadata records the Python version and what was left out.
    """

    VERSION = tfds.core.Version("1.0.0")
    # No checksum or citation files lie beside this module; looking for them would need
    # importlib_resources, which tfds does not install on the Pythons we support.
    code_path = None

    def __init__(self, *, collection: sources.Collection, data_dir: str):
        self._collection = collection
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents with their relative paths.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._collection.metadata),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        documents = self._collection.documents
        return {
            split: self._generate_examples(documents[split])
            for split in sources.SPLITS
            if documents[split]
        }

    def _generate_examples(self, documents: list[Document]) -> Iterator[tuple[int, dict]]:
        for number, document in enumerate(documents):
            yield number, {"path": document.path, "text": document.text}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a corpus: a sequence of whole documents, read from disk one at a time.

    ``fingerprint`` identifies the whole corpus (all splits), ``num_bytes`` is the UTF-8 length of
    this split's texts, ``metadata`` holds ``python_version`` and counts of what was skipped.
    """

    name: str
    split: str
    fingerprint: str
    num_bytes: int
    metadata: dict[str, Any]
    records: Sequence[Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Document:
        record = self.records[index]
        return Document(record["path"].decode(), record["text"].decode())

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def long_documents(self, min_bytes: int) -> list[Document]:
        """Documents of at least ``min_bytes`` of UTF-8, longest first (ties by path)."""
        sized = [(len(document.text.encode()), document) for document in self]
        sized = [item for item in sized if item[0] >= min_bytes]
        return [document for _, document in sorted(sized, key=lambda i: (-i[0], i[1].path))]


def load_corpus(name: str, split: str, data_dir: pathlib.Path | None = None) -> Corpus:
    """The documents of one split, prepared on first use under ``data_dir``.

    Args:
      name: ``python_stdlib``, ``python_packages`` or ``text:`` and the path of a file or folder.
      split: ``train``, ``validation`` or ``test``.
      data_dir: the cache folder (default: :func:`train.data.cache.cache_root`).

    Raises ``ValueError`` for an unknown name or split, an empty split or bad text, and
    ``FileNotFoundError`` for missing sources.
    """
    if split not in sources.SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(sources.SPLITS)}.")
    collection = _collect(name)
    documents = collection.documents[split]
    if not documents:
        raise ValueError(f"split {split!r} of {name} is empty: give it more text.")
    fingerprint = collection.fingerprint()
    kind = name.partition(":")[0]
    folder = (data_dir or cache_root()) / "corpora" / f"{kind}-{fingerprint[:16]}"
    with locked(folder):
        builder = Documents(collection=collection, data_dir=str(folder))
        if not builder.info.splits:
            tfds.disable_progress_bar()
            # The decorators tfds puts on its methods hide their types.
            builder.download_and_prepare()  # pyright: ignore[reportCallIssue]
    return Corpus(
        name=name,
        split=split,
        fingerprint=fingerprint,
        num_bytes=sum(len(document.text.encode()) for document in documents),
        metadata={key: _plain(value) for key, value in dict(builder.info.metadata or {}).items()},
        records=builder.as_data_source(split),  # pyright: ignore[reportCallIssue]
    )


def _collect(name: str) -> sources.Collection:
    if name == "python_stdlib":
        return sources.python_stdlib()
    if name == "python_packages":
        return sources.python_packages()
    kind, _, location = name.partition(":")
    if kind == "text" and location:
        return sources.text_files(location)
    raise ValueError(f"unknown corpus {name!r}: choose {CORPORA}.")


def _plain(value: str) -> Any:
    """Metadata is stored as strings; those that hold JSON objects or lists are read back."""
    return json.loads(value) if value.startswith(("{", "[")) else value
