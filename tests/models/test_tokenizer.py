import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from models.tokenizer import Tokenizer, check_vocab
from train.data.bpe import END_OF_TEXT, train_bpe

BPE = train_bpe(["for name in names:\n    print(name)\n" * 3, "naïve café €5 and 😀"], 280)
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}]


def sentencepiece_like() -> Tokenizer:
    """The Llama family's kind: word starts marked, unknown characters as byte tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", "▁a", "a", "b", "▁b"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, eos_token="</s>", bos_token="<s>")


SENTENCEPIECE = sentencepiece_like()


@given(st.text())
def test_any_text_round_trips(text):
    assert BPE.decode(BPE.encode(text)) == text


def test_special_tokens_in_documents_are_ordinary_text():
    text = f"a{END_OF_TEXT}b"
    literal = BPE.encode(text)
    assert BPE.eos_id not in literal
    assert BPE.decode(literal) == text
    assert BPE.encode_batch([text]) == [literal]
    parsed = BPE.encode(text, parse_special_tokens=True)
    assert parsed == [*BPE.encode("a"), BPE.eos_id, *BPE.encode("b")]
    assert BPE.decode(parsed, skip_special_tokens=True) == "ab"


def test_post_processor_tokens_only_on_request():
    backend = tokenizers.Tokenizer.from_str(BPE._parsing.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    tokenizer = Tokenizer(backend, eos_token=END_OF_TEXT)
    assert tokenizer.encode("a", add_special_tokens=True) == [0, *BPE.encode("a")]
    assert tokenizer.encode("a") == BPE.encode("a")


@given(st.lists(st.integers(0, 279), max_size=40))
def test_stream_of_any_ids_joins_to_the_decoded_whole(ids):
    stream = BPE.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == BPE.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet=st.sampled_from(" ab€é😀")))
def test_stream_keeps_spaces_and_byte_tokens_of_llama_tokenizers(text):
    ids = SENTENCEPIECE.encode(text)
    stream = SENTENCEPIECE.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == SENTENCEPIECE.decode(ids)


def test_stream_shows_a_character_with_its_last_byte_and_never_before():
    tokenizer = train_bpe(["abc"], 257)
    ids = tokenizer.encode("a€b")
    stream = tokenizer.stream()
    assert [stream.push(index) for index in ids] == ["a", "", "", "€", "b"]
    assert stream.push(ids[1:3]) == ""
    assert stream.flush() == "\ufffd"


def test_stream_skips_special_tokens_without_losing_the_space_after_them():
    a, b = SENTENCEPIECE.encode("a b")
    assert SENTENCEPIECE.eos_id is not None
    stream = SENTENCEPIECE.stream()
    assert [stream.push(index) for index in (a, SENTENCEPIECE.eos_id, b)] == ["a", "", " b"]


def test_save_and_load_keep_ids_special_tokens_and_template(tmp_path):
    saved = Tokenizer(
        tokenizers.Tokenizer.from_str(BPE._parsing.to_str()),
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        chat_template=CHATML,
    )
    saved.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode("names €") == saved.encode("names €")
        assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (0, 0, None)
        assert loaded.apply_chat_template(CHAT) == saved.apply_chat_template(CHAT)
        assert loaded.fingerprint == saved.fingerprint == BPE.fingerprint


def test_special_tokens_written_as_objects_and_in_the_special_tokens_map(tmp_path):
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "b", "bos_token": "c"}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("a") == [loaded.eos_id]
    assert loaded.encode("c") == [loaded.bos_id]


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"copy the model's tokenizer.json there"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="is not a tokenizers file"):
        Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(ValueError, match=r"eos token '<absent>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        Tokenizer.load(tmp_path)


def test_chat_template_sources(tmp_path):
    BPE.save(tmp_path)
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": "d"}]
    config = {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).apply_chat_template(CHAT) == "d"
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    rendered = Tokenizer.load(tmp_path).apply_chat_template(CHAT)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    without = Tokenizer.load(tmp_path).apply_chat_template(CHAT, add_generation_prompt=False)
    assert without == "<|im_start|>user\nHi<|im_end|>\n"


def render(template: str, messages=CHAT) -> str:
    backend = tokenizers.Tokenizer.from_str(BPE._parsing.to_str())
    return Tokenizer(backend, eos_token=END_OF_TEXT, chat_template=template).apply_chat_template(
        messages
    )


def test_chat_template_environment():
    assert render("{{ eos_token }}{{ bos_token }}") == END_OF_TEXT
    assert render("{{ messages | tojson }}", [{"role": "u", "content": "<é>"}]) == (
        '[{"role": "u", "content": "<é>"}]'
    )
    assert render("{% for m in [1, 2] %}{% break %}{% endfor %}ok") == "ok"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
    ],
    ids=["refused", "syntax", "sandboxed", "immutable", "type"],
)
def test_chat_template_errors_are_one_clear_sentence(template):
    with pytest.raises(ValueError, match="chat template rejects these messages"):
        render(template)


def test_chat_needs_a_template_and_a_message():
    with pytest.raises(ValueError, match="has no chat template"):
        BPE.apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="at least one message"):
        render(CHATML, [])


def test_vocabulary_must_fit_the_model():
    backend = tokenizers.Tokenizer.from_str(BPE._parsing.to_str())
    backend.add_tokens(["<extra>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 281
    check_vocab(tokenizer, 281)
    with pytest.raises(ValueError, match="281 ids but the model embeds 280"):
        check_vocab(tokenizer, 280)
