"""Raw text to corpus: what is read, what is dropped and why, and that nothing leaks."""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import SHARED, growmoe
from growmoe.data.clean import clean, content_key
from growmoe.data.corpus import SPLITS, Corpus, ShardWriter, TokenStream, token_dtype
from growmoe.data.documents import read_source
from growmoe.data.loader import Loader
from growmoe.data.prepare import PrepareSpec, SourceSpec, prepare
from growmoe.errors import GrowmoeError, UsageError


def spec(*sources: SourceSpec, **changes) -> PrepareSpec:
    base = {
        "tokenizer": None, "vocab_size": 300, "sample_mb": 1.0, "validation_fraction": 0.1,
        "min_chars": 1, "max_document_mb": 1.0, "skip_bad_records": False, "shard_tokens": 1000,
        "validation_length": 16, "validation_tokens": 64,
    }  # fmt: skip
    return PrepareSpec(sources=list(sources), **{**base, **changes})


def rows(count: int, prefix: str = "row") -> list[str]:
    return [f"{prefix} number {i}: the quick brown fox, 第{i}只狐狸。" for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make(tmp_path: Path, *sources: SourceSpec, **changes) -> Corpus:
    out = tmp_path / "corpus"
    out.mkdir()
    prepare(spec(*sources, **changes), out)
    return Corpus(out)


def documents(corpus: Corpus, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    texts = []
    for index in sorted((corpus.path / split).glob("*.idx")):
        offsets = np.fromfile(index, dtype=np.uint64).astype(int)
        ids = np.fromfile(index.with_suffix(".bin"), dtype=token_dtype(corpus.vocab_size))
        assert len(ids) == offsets[-1]
        for start, end in zip(offsets, offsets[1:]):
            assert ids[end - 1] == corpus.end_of_text
            texts.append(tokenizer.decode(ids[start : end - 1].tolist()))
    return texts


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = rows(60)
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "f.md").write_text("\n\n".join(texts), encoding="utf-8")
    for file in sorted(tmp_path.iterdir()):
        split = {".txt": "lines", ".md": "paragraphs"}.get(file.suffix, "file")
        found = read_source(str(file), text_field="text", split=split, limit=10_000)
        assert [record.text.strip() for record in found] == texts, file


def test_the_corpus_holds_exactly_the_documents(tmp_path: Path) -> None:
    texts = rows(80)
    source = SourceSpec(name="a", path=str(write_jsonl(tmp_path / "a.jsonl", texts)), weight=1)
    corpus = make(tmp_path, source)
    train, validation = documents(corpus, "train"), documents(corpus, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert len(list((corpus.path / "train").glob("a-*.bin"))) > 1  # several shards
    assert not (corpus.path / ".spool").exists()


def test_duplicates_are_counted_and_never_leak(tmp_path: Path) -> None:
    texts = rows(100)
    spaced = [text.replace(" ", "   ") + "\n" for text in texts]
    one = SourceSpec(name="a", path=str(write_jsonl(tmp_path / "a.jsonl", texts + texts)), weight=1)
    two = SourceSpec(
        name="b", path=str(write_jsonl(tmp_path / "b.jsonl", spaced + rows(20, "new"))), weight=1
    )
    corpus = make(tmp_path, one, two)
    first, second = corpus.manifest["sources"]
    assert first["dropped"] == {"duplicate": 100}
    assert second["dropped"] == {"duplicate": 100}
    train = {content_key(text) for text in documents(corpus, "train")}
    validation = {content_key(text) for text in documents(corpus, "validation")}
    assert len(train) + len(validation) == 120
    assert not train & validation
    assert validation


def test_the_split_depends_on_content_only(tmp_path: Path) -> None:
    texts = rows(100)
    results = []
    for name, order in (("x", texts), ("y", texts[::-1])):
        (tmp_path / name).mkdir()
        path = str(write_jsonl(tmp_path / name / "a.jsonl", order))
        corpus = make(tmp_path / name, SourceSpec(name="a", path=path, weight=1))
        results.append(sorted(documents(corpus, "validation")))
    assert results[0] == results[1]


def test_same_input_same_hash(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(50)))
    hashes = set()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        corpus = make(tmp_path / name, SourceSpec(name="a", path=path, weight=1))
        hashes.add(corpus.manifest["hash"])
    assert len(hashes) == 1


def test_reasons_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}).encode() for text in rows(30)]
    bad = [
        b"not json", b'{"other": 1}', b'{"text": "\xff\xfe"}', b'{"text": "hi"}', b'{"text": 3}',
        b"[1]", json.dumps({"text": "x" * 3_000_000}).encode(), b'{"text": "\\ud800 lone half"}',
        json.dumps({"text": "\ufffd" * 20}).encode(),
    ]  # fmt: skip
    path.write_bytes(b"\n".join(good + bad))
    source = SourceSpec(name="a", path=str(path), weight=1)
    corpus = make(tmp_path, source, skip_bad_records=True, min_chars=5)
    entry = corpus.manifest["sources"][0]
    assert entry["dropped"] == {
        "garbled": 1, "invalid_utf8": 2, "no_text": 2, "not_json": 2, "too_long": 1, "too_short": 1
    }  # fmt: skip
    assert entry["documents"]["read"] == 39
    assert entry["documents"]["train"] + entry["documents"]["validation"] == 30


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json", "is not a JSON object"),
        (b'{"other": 1}', "has no text in field 'text'"),
        (b'{"text": "\xff"}', "is not valid UTF-8"),
        (b'{"text": "' + b"x" * 50_000_000 + b'"}', "is longer than the largest document allowed"),
    ],
)
def test_a_bad_record_is_named_by_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*(json.dumps({"text": t}).encode() for t in rows(5)), line]))
    done = growmoe("prepare", path, "--out", tmp_path / "out", "--vocab", 300)
    assert done.code == 1
    assert f"{path}:6 {words}" in done.err
    assert "Traceback" not in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_empty_and_tiny_inputs(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    one = tmp_path / "one.txt"
    one.write_text("the only document")
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n ")
    parquet = tmp_path / "x.parquet"
    parquet.write_bytes(b"PAR1 cut")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    zst = tmp_path / "cut.jsonl.zst"
    zst.write_bytes(b"\x28\xb5\x2f\xfd garbage")
    for path, code, words in (
        (empty, 2, "holds no files to read"),
        (tmp_path / "absent", 2, "does not exist"),
        (one, 2, "single document"),
        (blank, 2, "gives no training documents: 1 read, 1 empty"),
        (parquet, 1, "is not a whole parquet file"),
        (cut, 1, "is not a whole compressed file"),
        (zst, 1, "is not a whole compressed file"),
        (f"{tmp_path}/*.nothing", 2, "holds no files to read"),
        ("package:no_such_package/x", 2, "package no_such_package is not installed"),
    ):
        done = growmoe("prepare", f"a={path}", "--out", tmp_path / "out", "--vocab", 300)
        assert (done.code, words in done.err) == (code, True), (path, done.err)
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()


def test_a_small_source_still_gets_a_validation_document(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(12)))
    corpus = make(tmp_path, SourceSpec(name="a", path=path, weight=1), validation_fraction=1e-9)
    assert len(documents(corpus, "validation")) == 1
    assert len(documents(corpus, "train")) == 11


def test_memory_stays_flat_as_input_grows(tmp_path: Path) -> None:
    """Ten times the documents may not take noticeably more memory (no list, no set of keys)."""
    peaks = []
    for count in (5_000, 50_000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            for i in range(count):
                words = " ".join(str((i * 7919 + j * j) % 100_003) for j in range(60))
                file.write(json.dumps({"text": f"document {i}: {words}"}) + "\n")
        out = tmp_path / f"out{count}"
        out.mkdir()
        code = (
            "import resource, sys\n"
            "from pathlib import Path\n"
            "from growmoe.data.prepare import *\n"
            f"s = SourceSpec(name='a', path={str(path)!r}, weight=1)\n"
            "prepare(PrepareSpec(sources=[s], tokenizer=None, vocab_size=300, sample_mb=1.0,\n"
            "    validation_fraction=0.01, min_chars=1, max_document_mb=1.0,\n"
            f"    skip_bad_records=False, shard_tokens=10**9), Path({str(out)!r}))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert resource.RUSAGE_SELF == 0
    assert peaks[1] - peaks[0] < 25, peaks  # MB; the input grew by 20 MB, its tokens by more


# ---- cleaning ----


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeffx\x00y\x1b[31mred\x1b[0m", "xyred"),
        ("中文，标点：（不变）！“引号”", "中文，标点：（不变）！“引号”"),
        ("L&#39;Ã©tÃ©", "L&#39;été"),
        ("e\u0301", "é"),
        ("a\u2028b\u0085c", "a\nb\nc"),
    ],
)
def test_cleaning(raw: str, expected: str) -> None:
    assert clean(raw) == expected


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_cleaning_is_stable(text: str) -> None:
    once = clean(text)
    assert clean(once) == once or "\ufffd" in once or not once.isascii()
    assert content_key(once) == content_key(once.replace("\n", "  "))


@given(st.text(max_size=100))
@settings(max_examples=100, deadline=None)
def test_tokenizer_is_lossless(corpus: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_tokenizer(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from conftest import write_tiny

    model = write_tiny(tmp_path / "m", tokenizer_from=corpus, vocab_size=320)
    theirs = AutoTokenizer.from_pretrained(model)
    ours = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    text = "Naïve 中文 x != y\n\n 12345 <|endoftext|>"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == Corpus(corpus).end_of_text


# ---- shards and batches ----


@given(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=9), min_size=1, max_size=30),
       st.integers(1, 40))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_reading_crosses_shard_borders(tmp_path_factory, docs, shard_tokens: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "a", token_dtype(300), shard_tokens)
    for ids in docs:
        writer.add(ids)
    writer.close()
    flat = [token for ids in docs for token in ids]
    stream = TokenStream(sorted(folder.glob("*.bin")), token_dtype(300))
    assert len(stream) == len(flat) == writer.tokens
    for start in range(0, len(flat), 7):
        count = min(11, len(flat) - start)
        assert stream.read(start, count).tolist() == flat[start : start + count]


def test_skipping_equals_drawing(corpus: Path) -> None:
    opened = Corpus(corpus)
    drawn, skipped = (Loader(opened, 16, seed=5) for _ in range(2))
    batches = [drawn.next_batch(3) for _ in range(200)]  # several epochs
    skipped.skip(3 * 120)
    for expected in batches[120:]:
        assert np.array_equal(skipped.next_batch(3), expected)
    assert not np.array_equal(Loader(opened, 16, seed=6).next_batch(3), batches[0])


def test_weights_are_kept_at_every_moment(corpus: Path) -> None:
    loader = Loader(Corpus(corpus), 16, seed=0, weights={"english": 3, "chinese": 1})
    for step in range(1, 300):
        loader.next_batch(1)
        assert abs(loader.taken[0] - 0.75 * step) <= 1


def test_an_epoch_shows_every_window_once(corpus: Path) -> None:
    opened = Corpus(corpus)
    loader = Loader(opened, 16, seed=0, weights={"english": 1})
    windows = loader.sources[0].windows
    seen = sorted(tuple(loader.next_batch(1)[0]) for _ in range(windows))
    stream = opened.streams["train"]["english"]
    assert seen == sorted(tuple(stream.read(i * 16, 17)) for i in range(windows))


def test_broken_corpora_are_named(corpus: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(UsageError, match="no manifest.json"):
        Corpus(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = next((copy / "train").glob("english-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(GrowmoeError, match="source english has"):
        Corpus(copy)
    with pytest.raises(UsageError, match="no source 'french'"):
        Loader(Corpus(corpus), 16, 0, {"french": 1})
    with pytest.raises(UsageError, match="fewer than one sequence"):
        Loader(Corpus(corpus), 1_000_000, 0)
    assert set(SPLITS) == {"train", "validation"}


@pytest.mark.skipif(not SHARED.exists(), reason="the shared development texts are not here")
def test_real_bilingual_text(tmp_path: Path) -> None:
    source = SourceSpec(name="web", path=str(SHARED / "pretrain" / "docs-00000.jsonl.gz"), weight=1)
    corpus = make(tmp_path, source, vocab_size=2000, max_document_mb=8.0, shard_tokens=10**8)
    entry = corpus.manifest["sources"][0]
    assert entry["documents"]["train"] > 1000
    assert entry["dropped"].get("duplicate", 0) > 0


def test_one_huge_document_still_teaches_the_tokenizer(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(rows(4000)), encoding="utf-8")
    other = write_jsonl(tmp_path / "a.jsonl", rows(30, "other"))
    corpus = make(
        tmp_path, SourceSpec(name="book", path=str(book), weight=1),
        SourceSpec(name="other", path=str(other), weight=1), sample_mb=0.02,
    )  # fmt: skip
    entry = corpus.manifest["sources"][0]
    assert entry["tokens"]["train"] < 0.8 * entry["bytes"]["train"]  # merges were learned


def test_a_given_tokenizer_names_its_own_end_of_text(corpus: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(corpus / "tokenizer.json", model)
    (model / "config.json").write_text('{"eos_token_id": [2, 7]}')
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(30)))
    made = make(tmp_path, SourceSpec(name="a", path=path, weight=1), tokenizer=str(model))
    assert made.end_of_text == 2


def test_paragraphs_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("short\n\n" + "a line\n" * 1000 + "\nlast\n")
    found = list(read_source(str(path), text_field="text", split="paragraphs", limit=100))
    assert [(r.text.strip(), r.problem) for r in found] == [
        ("short", ""), ("", "too_long"), ("last", "")
    ]  # fmt: skip
