"""Text to token ids and back, by the ``tokenizers`` library and Hugging Face's file layout."""

import datetime
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

_REPLACEMENT = "\ufffd"
_CONFIG = "tokenizer_config.json"


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with the special tokens and the chat template of its model.

    Args:
      backend: the tokenizer proper, from a file or built in memory.
      eos_token, bos_token, pad_token: their text; each must be in the vocabulary.
      chat_template: Jinja source, in the convention of Hugging Face chat templates.

    Raises ``ValueError`` when a named special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ):
        # One backend per way of reading special tokens: the switch is mutable state of a backend,
        # and flipping it per call would not be safe with threads.
        self._parsing = backend
        self._literal = tokenizers.Tokenizer.from_str(backend.to_str())
        self._parsing.encode_special_tokens = False
        self._literal.encode_special_tokens = True
        self.eos_token, self.bos_token, self.pad_token = eos_token, bos_token, pad_token
        self.eos_id = self._special_id("eos", eos_token)
        self.bos_id = self._special_id("bos", bos_token)
        self.pad_id = self._special_id("pad", pad_token)
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Read ``tokenizer.json`` (a file, or in a folder) and the settings beside it.

        Special tokens come from ``tokenizer_config.json``, then ``special_tokens_map.json``; the
        chat template from ``chat_template.jinja``, then ``tokenizer_config.json``.

        Raises ``FileNotFoundError`` when there is no tokenizer file and ``ValueError`` when a
        file cannot be parsed.
        """
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}: copy the model's tokenizer.json there, or train one "
                "with python -m train.data.bpe."
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(
                f"{file} is not a tokenizers file ({error}): fetch it again."
            ) from error
        backend.no_truncation()
        backend.no_padding()
        folder = file.parent
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / _CONFIG)
        template = folder / "chat_template.jinja"
        return cls(
            backend,
            eos_token=_token_text(config.get("eos_token")),
            bos_token=_token_text(config.get("bos_token")),
            pad_token=_token_text(config.get("pad_token")),
            chat_template=template.read_text(encoding="utf-8")
            if template.is_file()
            else _template_text(config.get("chat_template")),
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; :meth:`load` reads them back."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._parsing.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.eos_token,
            "bos_token": self.bos_token,
            "pad_token": self.pad_token,
            "chat_template": self.chat_template,
        }
        config = {key: value for key, value in config.items() if value is not None}
        (folder / _CONFIG).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of ``text``.

        ``add_special_tokens`` adds what the tokenizer's post-processor adds (a bos, for Llama).
        ``parse_special_tokens`` reads ``<|endoftext|>`` and its like in the text as the tokens
        they name, as a rendered chat template needs; otherwise they are ordinary characters, as
        documents and user input need.
        """
        backend = self._parsing if parse_special_tokens else self._literal
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt that a model continues, as one user message of a chat if ``chat``.

        Raises ``ValueError`` when there is no chat template, or when it rejects the message.
        """
        if not chat:
            return self.encode(prompt, add_special_tokens=True)
        text = self.apply_chat_template([{"role": "user", "content": prompt}])
        return self.encode(text, parse_special_tokens=True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many documents, in parallel, without special tokens."""
        encoded = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._parsing.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one after the other."""
        return StreamDecoder(self, skip_special_tokens)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the eos if there is one."""
        return () if self.eos_id is None else (self.eos_id,)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return 1 + max(self._parsing.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that decides how documents become ids."""
        content = json.dumps([self._parsing.to_str(), self.bos_id, self.eos_id])
        return hashlib.sha256(content.encode()).hexdigest()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation; encode it with ``parse_special_tokens=True``.

        Args:
          messages: ``{"role": ..., "content": ...}`` in order.
          add_generation_prompt: end with the header of the assistant's reply.

        Raises ``ValueError`` when there is no template, or when it rejects the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template: pass a plain prompt, or put "
                "chat_template.jinja beside tokenizer.json."
            )
        if not messages:
            raise ValueError("a chat needs at least one message: give a role and a content.")
        try:
            return _compile_template(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                eos_token=self.eos_token or "",
                bos_token=self.bos_token or "",
                pad_token=self.pad_token or "",
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template rejects these messages ({error}): check roles and contents."
            ) from error

    def _special_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        index = self._parsing.token_to_id(token)
        if index is None:
            raise ValueError(
                f"the {name} token {token!r} is not in the vocabulary: correct {_CONFIG}."
            )
        return index


class StreamDecoder:
    """Decodes ids as they arrive, holding back characters whose bytes are still incomplete.

    The pieces from :meth:`push` and the last one from :meth:`flush` join to the decoded whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Ids since the last but one emission, and how much of their text is out already. The
        # older ids are context: some decoders treat a first token differently (leading spaces).
        self._ids: list[int] = []
        self._new_from = 0
        self._emitted = 0

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that became certain with these ids; may be empty."""
        self._ids += [ids] if isinstance(ids, int) else ids
        text = self._text()
        # A trailing U+FFFD may be the start of a character: keep it until more bytes decide.
        if text.endswith(_REPLACEMENT):
            certain = text.rstrip(_REPLACEMENT)
            piece = certain[self._emitted :]
            self._emitted = max(self._emitted, len(certain))
            return piece
        return self._emit(text)

    def flush(self) -> str:
        """What is still held back, incomplete bytes as U+FFFD."""
        return self._emit(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)

    def _emit(self, text: str) -> str:
        piece = text[self._emitted :]
        if piece:
            self._ids = self._ids[self._new_from :]
            self._new_from = len(self._ids)
            self._emitted = len(self._text())
        return piece


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ``ValueError`` when the tokenizer has ids that a model of ``vocab_size`` lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model embeds {vocab_size}: use "
            "the tokenizer the model was trained with."
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: fetch it again.")
    return content


def _token_text(entry: Any) -> str | None:
    """A special token is written as its text or as an object with ``content``."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _template_text(entry: Any) -> str | None:
    """A chat template is written as text or as a list of named ones with a ``default``."""
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        return named.get("default")
    return entry


@functools.lru_cache(maxsize=8)
def _compile_template(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def tojson(value: Any, indent: int | None = None) -> str:
        # Jinja's own filter escapes for HTML, which prompts must not be.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)
