import platform

import pytest

from train.data import sources
from train.data.corpus import Documents, load_corpus


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(100):
        (texts / f"{number}.txt").write_bytes((f"é {number}\r\n" + "x" * number).encode())
    return texts


def test_documents_come_back_whole_with_paths_and_sizes(folder):
    collection = sources.text_files(str(folder))
    for split in sources.SPLITS:
        corpus = load_corpus(f"text:{folder}", split)
        assert list(corpus) == collection.documents[split]
        assert corpus.num_bytes == sum(len(document.text.encode()) for document in corpus)
        for document in corpus:
            assert document.text.encode() == (folder / document.path).read_bytes().replace(
                b"\r\n", b"\n"
            )
    assert corpus.metadata["python_version"] == platform.python_version()
    assert corpus.metadata["skipped"] == {"empty": 0}


def test_a_prepared_corpus_is_reused_and_a_changed_one_is_prepared_anew(folder, monkeypatch):
    prepared = []
    generate = Documents._split_generators

    def counting(self, dl_manager):
        prepared.append(1)
        return generate(self, dl_manager)

    monkeypatch.setattr(Documents, "_split_generators", counting)
    first = load_corpus(f"text:{folder}", "train")
    again = load_corpus(f"text:{folder}", "validation")
    assert (len(prepared), first.fingerprint) == (1, again.fingerprint)
    (folder / first[0].path).write_text("changed")
    changed = load_corpus(f"text:{folder}", "train")
    assert len(prepared) == 2
    assert changed.fingerprint != first.fingerprint
    assert "changed" in [document.text for document in changed]


def test_long_documents_are_whole_and_longest_first(folder):
    corpus = load_corpus(f"text:{folder}", "train")
    long = corpus.long_documents(60)
    sizes = [len(document.text.encode()) for document in long]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 60
    assert len(long) == sum(len(document.text.encode()) >= 60 for document in corpus)


def test_bad_names_are_refused(folder):
    with pytest.raises(ValueError, match="choose python_stdlib, python_packages or text:PATH"):
        load_corpus("wikipedia", "train")
    with pytest.raises(ValueError, match="unknown corpus 'text:'"):
        load_corpus("text:", "train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_corpus(f"text:{folder}", "dev")


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("one line only")
    with pytest.raises(ValueError, match=r"split 'validation' of text:.* is empty"):
        load_corpus(f"text:{tmp_path}", "validation", data_dir=tmp_path)


def test_an_unwritable_cache_names_the_fix(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set LONGREACH_DATA to a writable folder"):
        load_corpus(f"text:{folder}", "train")
