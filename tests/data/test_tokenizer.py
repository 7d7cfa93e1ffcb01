"""Tokenizers: nothing is lost, the same text gives the same one, bad files fail."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_jax.data import text, tokenizer
from hope_jax.data.tokenizer import BpeTokenizer, ByteTokenizer

_TEXTS = [
    Path(json.decoder.__file__).read_bytes(),
    "the cat and the hat, naïve façade €\n".encode() * 20,
]
_BPE = tokenizer.train_bpe(_TEXTS, vocab_size=320)
_BOTH = pytest.mark.parametrize("tok", [ByteTokenizer(), _BPE], ids=["bytes", "bpe"])


@_BOTH
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_every_byte_comes_back(tok, data):
    ids = tok.encode(data)
    assert ids.dtype == np.int32
    assert tok.decode(ids) == data
    assert not ids.size or (ids.min() >= 0 and ids.max() < tok.bos)


@_BOTH
def test_hard_texts_come_back(tok):
    for data in (
        bytes(range(256)),
        b"",
        b"\x00\xff\xfe  \r\n\t\x80return \xe2\x82",  # ends inside a character
        b"\xed\xb2\x80",  # a surrogate, which is not UTF-8
        "🏳️‍🌈 e\u0301 \u202e \ufeff\ufffd ĠĊ".encode(),
        b"<|endoftext|><s>[BOS]<bos>",
    ):
        assert tok.decode(tok.encode(data)) == data


@_BOTH
def test_bos_is_the_last_id_and_stands_for_no_bytes(tok):
    assert tok.bos == tok.vocab_size - 1
    ids = np.concatenate([[tok.bos], tok.encode(b"return"), [tok.bos]])
    assert tok.decode(ids) == b"return"


def test_sizes():
    assert (ByteTokenizer().vocab_size, ByteTokenizer().bos) == (257, 256)
    assert _BPE.vocab_size == 320
    # Too little text for more merges: fewer ids, no invented ones.
    assert tokenizer.train_bpe([b"abab"], vocab_size=400).merges == (
        (97, 98),
        (256, 256),
    )


def test_merges_by_hand():
    tok = BpeTokenizer(((97, 98), (256, 99), (98, 99), (97, 258)))
    # The last merge makes "abc" again: no new id, so bos stays at 259.
    assert (tok.vocab_size, tok.bos) == (260, 259)
    assert tok.encode(b"abcab\xffc").tolist() == [257, 256, 255, 99]
    assert tok.decode([257, 258]) == b"abcbc"


def test_bpe_is_shorter_than_bytes():
    assert len(_BPE.encode(_TEXTS[0])) < len(_TEXTS[0]) / 1.5


def test_long_documents_are_read_in_pieces(monkeypatch):
    data = _TEXTS[0] + b"caf\xe9\n" + _TEXTS[1]
    whole = _BPE.encode(data)
    monkeypatch.setattr(tokenizer, "_PIECE", 64)
    assert len(list(tokenizer._pieces(data))) > 10
    assert b"".join(tokenizer._pieces(data)) == data
    assert _BPE.decode(_BPE.encode(data)) == data
    np.testing.assert_array_equal(_BPE.encode(data), whole)
    batch = _BPE.encode_batch([data, b"", b"x", data])
    assert [len(ids) for ids in batch] == [len(whole), 0, 1, len(whole)]


def test_same_text_gives_the_same_tokenizer_in_another_process():
    code = (
        "from hope_jax.data import tokenizer;"
        f"texts = {_TEXTS!r};"
        "print(tokenizer.train_bpe(texts, vocab_size=320).fingerprint)"
    )
    for threads in ("1", "4"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == _BPE.fingerprint


def test_fingerprints_tell_tokenizers_apart():
    other = tokenizer.train_bpe(_TEXTS[:1], vocab_size=320)
    prints = {tok.fingerprint for tok in (ByteTokenizer(), _BPE, other)}
    assert len(prints) == 3 and all(len(p) == 64 for p in prints)


@_BOTH
def test_saved_and_loaded(tok, tmp_path):
    tok.save(tmp_path / "tokenizer.json")
    again = tokenizer.load(tmp_path / "tokenizer.json")
    assert again == tok and again.fingerprint == tok.fingerprint
    np.testing.assert_array_equal(again.encode(_TEXTS[0]), tok.encode(_TEXTS[0]))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"kind": "words"},
        {"merges": [[97, 300]]},
        {"merges": [[97, -1]]},
        {"merges": [[97]]},
        {"merges": [["a", "b"]]},
        {"merges": [[97.0, 98]]},
        {"merges": [[True, 98]]},
        {"merges": 5},
    ],
    ids=str,
)
def test_damaged_files_are_refused(change, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(_BPE.definition | change))
    with pytest.raises(ValueError, match=r"t\.json' is not a tokenizer: "):
        tokenizer.load(path)


def test_files_that_are_no_json_or_not_there_are_refused(tmp_path):
    path = tmp_path / "t.json"
    for content in (b"", b"{", b"[]", b"\x80\x04pickle"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            tokenizer.load(path)
    with pytest.raises(FileNotFoundError, match="none.json"):
        tokenizer.load(tmp_path / "none.json")


def test_files_that_ask_for_too_much_memory_are_refused_before_it_is_taken(tmp_path):
    path = tmp_path / "t.json"
    doubling = [[97, 98], *([255 + i, 255 + i] for i in range(1, 45))]
    path.write_text(json.dumps(_BPE.definition | {"merges": doubling}))
    assert path.stat().st_size < 700
    with pytest.raises(ValueError, match=r"merges\[16\]: 131,072 are more than the 65"):
        tokenizer.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a tokenizer: RecursionError"):
        tokenizer.load(path)
    path.write_text("")
    os.truncate(path, 1 << 40)  # of holes
    with pytest.raises(ValueError, match="bytes of .*t.json': 1,099,511,627,776 are"):
        tokenizer.load(path)
    _BPE.save(path)
    said = json.loads(path.read_text())
    said["added_tokens"][0]["id"] = 2**31
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="ids: 2,147,483,649 are more than the 4,194"):
        tokenizer.load(path)


def test_training_takes_time_like_the_size_of_a_text_without_spaces():
    rng = np.random.default_rng(0)
    data = rng.integers(97, 123, 500_000, dtype=np.uint8).tobytes()
    began = time.process_time()  # 31 s, were it the square of its length
    found = tokenizer.train_bpe([data, b" " * 500_000], 300)
    assert time.process_time() - began < 8
    assert found.vocab_size == 300
    assert found.decode(found.encode(data)) == data


@_BOTH
def test_decode_refuses_ids_outside_the_vocabulary(tok):
    for wrong in (tok.vocab_size, -1):
        with pytest.raises(ValueError, match=rf"holds {wrong}, outside \[0, "):
            tok.decode([97, wrong])
    with pytest.raises(ValueError, match="whole numbers in one dimension.*float64"):
        tok.decode([1.5])
    assert tok.decode([]) == b""


def test_training_refuses_what_it_cannot_learn_from():
    with pytest.raises(ValueError, match="vocab_size must be at least 257.* got 256"):
        tokenizer.train_bpe(_TEXTS, vocab_size=256)
    with pytest.raises(ValueError, match="texts holds no text"):
        tokenizer.train_bpe([b"", b"\xff\xfe"])


@_BOTH
def test_documents_are_led_by_bos(tok):
    documents = [text.Document("a", _TEXTS[0]), text.Document("b", b"\xff")]
    encoded = tokenizer.encode_documents(tok, documents)
    for document, ids in zip(documents, encoded, strict=True):
        assert ids.dtype == np.int32 and ids[0] == tok.bos
        assert tok.decode(ids) == document.data


# The format of Hugging Face -----------------------------------------------------------


def library(path):
    return tokenizers.Tokenizer.from_file(str(path))


@_BOTH
def test_the_library_reads_what_is_saved_and_encodes_alike(tok, tmp_path):
    tok.save(tmp_path / "tokenizer.json")
    theirs = library(tmp_path / "tokenizer.json")
    assert theirs.get_vocab_size() == tok.vocab_size
    assert theirs.token_to_id("<|begin of text|>") == tok.bos
    for data in (*_TEXTS, b"a  b\n\n\tc\r\n", "🏳️‍🌈 e\u0301 \ufffd ĠĊ".encode()):
        ids = tok.encode(data)
        assert theirs.encode(data.decode()).ids == ids.tolist()
        assert theirs.decode(ids.tolist()) == data.decode()


def test_bpe_without_merges_is_not_taken_for_bytes(tmp_path):
    BpeTokenizer(()).save(tmp_path / "t.json")
    assert tokenizer.load(tmp_path / "t.json") == BpeTokenizer(())


@_BOTH
def test_files_of_the_former_format_are_read(tok, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(tok.definition))
    again = tokenizer.load(tmp_path / "t.json")
    assert again == tok and again.fingerprint == tok.fingerprint


@_BOTH
def test_a_string_is_its_utf8(tok):
    np.testing.assert_array_equal(tok.encode("naïve €"), tok.encode("naïve €".encode()))


def byte_level(path, bos="<|start|>", special=True):
    """As GPT-2's and Llama 3's: other ids than ours, special tokens at the end."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([t.decode() for t in _TEXTS], trainer)
    made.add_tokens([tokenizers.AddedToken(bos, special=special), "<|plain|>"])
    made.enable_truncation(3)
    made.save(str(path))
    return made


def spaced(path, prefix=True):
    """As Llama 2's, or Gemma's: pieces with ▁ for spaces, and bytes to fall back on."""
    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "a", "b", "ab", "▁ab"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    first = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    made.add_special_tokens(["<unk>", "<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.save(str(path))
    return made


@pytest.mark.parametrize("special", [True, False])
def test_a_byte_level_tokenizer_of_others(special, tmp_path):
    path = tmp_path / "tokenizer.json"
    theirs = byte_level(path, special=special)
    tok = tokenizer.load(path, bos="<|start|>")
    theirs.no_truncation()
    assert (tok.bos, tok.vocab_size) == (300, 302)
    for data in _TEXTS:
        assert tok.encode(data).tolist() == theirs.encode(data.decode()).ids
    for data in (*_TEXTS, bytes(range(256)), b"", b"<|start|> \xff<|plain|>"):
        ids = tok.encode(data)
        assert ids.dtype == np.int32 and tok.decode(ids) == data
        assert tok.bos not in ids
    assert 301 in tok.encode(b"<|plain|>")
    # Kept with what begins a text, so that a run goes on with it.
    (tmp_path / "run").mkdir()
    tok.save(tmp_path / "run" / "tokenizer.json")
    again = tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert again == tok and again.fingerprint == tok.fingerprint
    other = tokenizer.load(path, bos="<|plain|>")
    assert other.fingerprint != tok.fingerprint


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_with_bytes_to_fall_back_on(prefix, tmp_path):
    theirs = spaced(tmp_path / "t.json", prefix)
    tok = tokenizer.load(tmp_path / "t.json")
    assert (tok.bos, tok.vocab_size) == (1, 263)
    for data in (b"ab ab", b" b", "é ab\n".encode(), b"<s>"):
        ids = tok.encode(data)
        plain = theirs.encode(data.decode(), add_special_tokens=False).ids
        assert ids.tolist() == plain or data == b"<s>"
        assert tok.decode([tok.bos, *ids]) == data
        assert tok.decode(ids) == b" " * prefix + data
        assert tok.bos not in ids
    if prefix:
        with pytest.raises(
            ValueError, match=r"texts\[1\] has the bytes b'.xff', which"
        ):
            tok.encode_batch([b"a", b"b\xff"])
    else:
        assert tok.decode(tok.encode(b"ab\xff ab")) == b"ab\xff ab"


def test_what_begins_a_text_is_found_beside_it(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(path)
    with pytest.raises(ValueError, match=r"says of no token .* bos='<\|endoftext\|>'"):
        tokenizer.load(path)
    beside = tmp_path / "tokenizer_config.json"
    for said in ("<|start|>", {"content": "<|start|>"}):
        beside.write_text(json.dumps({"bos_token": said}))
        assert tokenizer.load(path).bos == 300
    with pytest.raises(ValueError, match="bos must be a token of .* got 'none'"):
        tokenizer.load(path, bos="none")
    _BPE.save(tmp_path / "ours.json")
    with pytest.raises(ValueError, match="bos is for tokenizers of others, got 'a'"):
        tokenizer.load(tmp_path / "ours.json", bos="a")
    with pytest.raises(ValueError, match="bos must be the id of a token, got 302"):
        dataclasses.replace(tokenizer.load(path), bos=302)


def test_tokenizers_whose_tokens_have_no_bytes_are_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    for named in ("none", "WordPiece"):
        made.save(str(tmp_path / "t.json"))
        with pytest.raises(ValueError, match=f"decoder is '{named}' gives its tokens"):
            tokenizer.load(tmp_path / "t.json", bos="a")
        made.decoder = tokenizers.decoders.WordPiece()


def test_ours_is_told_from_one_that_only_names_its_first_token(tmp_path):
    said = json.loads(_BPE.to_library().to_str())
    said["model"]["merges"] = said["model"]["merges"][:-1]
    (tmp_path / "t.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="but is not as this package saves"):
        tokenizer.load(tmp_path / "t.json")
