"""Prompts to token ids, with the tokenizer of the backbone; it travels inside the checkpoint."""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as _Backend

from vla_jax.data.errors import DataError, TextLengthError
from vla_jax.data.language import qwen_tiktoken, sentencepiece
from vla_jax.files import explain_file, is_pointer
from vla_jax.shipped import install_hint

# Of tokenizers made by `Tokenizer.build`; the order is the id, as in Kosmos-2's vocabulary.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<grounding>")
# Names of the token that ends a text: Gemma's, sentencepiece's, those of chats.
_ENDS = ("<eos>", "</s>", "<|im_end|>", "<|endoftext|>")
# What transformers needs to convert a sentencepiece model: module -> package.
_CONVERTERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
# Files of a byte-level tokenizer that nothing else describes.
_PAIRS = ("vocab.json", "merges.txt")


class Tokenizer:
    """A Hugging Face `tokenizers` pipeline with fixed-length, right-padded output."""

    def __init__(self, backend: _Backend):
        """Takes `backend` over; its own padding and truncation are switched off."""
        padding = backend.padding or {}
        self.pad_id = int(padding.get("pad_id", backend.token_to_id("<pad>") or 0))
        self._pad_token = padding.get("pad_token", backend.id_to_token(self.pad_id) or "<pad>")
        self._backend = backend
        # `encode` pads itself, to the length it is asked for.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._rows: int | None = None

    @classmethod
    def from_dir(
        cls, hf_dir: str | Path, added: Iterable[str] = (), plain: bool = False
    ) -> "Tokenizer":
        """Reads tokenizer.json of a Hugging Face folder, or converts the files it has instead.

        Those are qwen.tiktoken, a sentencepiece file (openpi's alone, LLaMA's, Kosmos-2's),
        vocab.json and merges.txt alone (OFA), or what transformers reads.

        Args:
            hf_dir: the folder.
            added: special tokens that get the next ids, in this order, where they are missing.
            plain: nothing is added to a text (`add_special_tokens=False`); special tokens that it
                spells out are still found.

        Raises:
            FileNotFoundError: there is no tokenizer in the folder.
            ValueError: there is one, but damaged.
            ImportError: a conversion is needed and transformers is not installed.
        """
        folder = Path(hf_dir).expanduser()
        path = folder / "tokenizer.json"
        _refuse_pointers(folder)
        if path.exists():
            try:
                backend = _Backend.from_file(str(path))
            except Exception as error:  # the library raises nothing more special
                raise ValueError(f"{path}: {explain_file(path) or error}") from error
            # tokenizer.json often has no padding; the files beside it name the token.
            pad = _pad_token(folder)
            if pad and backend.token_to_id(pad) is not None:
                backend.enable_padding(pad_id=backend.token_to_id(pad), pad_token=pad)
            return cls(_plain(_with_tokens(backend, added), plain))
        if (folder / qwen_tiktoken.FILE).is_file():
            return cls(qwen_tiktoken.read(folder / qwen_tiktoken.FILE))
        pieces = sentencepiece.read_folder(folder)
        if pieces is not None:
            return cls(_plain(_with_tokens(pieces, added), plain))
        if not any(folder.glob("*token*")):
            if all((folder / name).is_file() for name in _PAIRS):
                return cls(_byte_level(folder))
            raise FileNotFoundError(f"{folder}: no tokenizer.json and no other tokenizer files")
        try:
            # Imported here, as serving runs without transformers.
            from transformers import AutoTokenizer
        except ImportError as error:
            hint = f"{install_hint('convert')} to convert the tokenizer files it has"
            raise ImportError(f"{folder}: no tokenizer.json; {hint}") from error
        # Without these, transformers' own message does not say what to install.
        lacking = [name for name in _CONVERTERS if not _installed(name)]
        if lacking and any(folder.glob("*.model")):
            names = " and ".join(_CONVERTERS[name] for name in lacking)
            raise ImportError(
                f"{folder}: no tokenizer.json, and its *.model cannot be converted without "
                f"{names}: {install_hint('convert')}"
            )
        try:
            slow = _class_of(folder, AutoTokenizer).from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder}: its tokenizer cannot be converted: {error}") from error
        backend = slow.backend_tokenizer
        if slow.pad_token_id is not None:
            backend.enable_padding(pad_id=slow.pad_token_id, pad_token=slow.pad_token)
        return cls(_plain(_with_tokens(backend, added), plain))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is empty: weights imported without a tokenizer; or it is none.
        """
        if not text:
            raise ValueError(
                "the checkpoint has no tokenizer: import it again from a folder that has one"
            )
        try:
            return cls(_Backend.from_str(text))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"the tokenizer of the checkpoint cannot be read: {error}") from error

    def to_json(self) -> str:
        """The whole tokenizer as text."""
        # With the padding, by which `from_json` finds the id again.
        self._backend.enable_padding(pad_id=self.pad_id, pad_token=self._pad_token)
        try:
            return self._backend.to_str()
        finally:
            self._backend.no_padding()

    @classmethod
    def build(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A word-level tokenizer over `texts`, for models trained from nothing.

        Words are split at white space and keep their case; the most frequent ones get an id, in
        order of frequency, then of spelling; the rest are <unk>. Every prompt is `<s> ... </s>`.

        Raises:
            ValueError: `vocab_size` leaves no room for words.
        """
        if vocab_size <= len(SPECIALS):
            raise ValueError(f"vocab_size {vocab_size} must exceed the {len(SPECIALS)} specials")
        counts = Counter(word for text in texts for word in text.split() if word not in SPECIALS)
        # Ties go by spelling, so that ids do not depend on the order of the texts.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        words = [*SPECIALS, *ranked[: vocab_size - len(SPECIALS)]]
        backend = _Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        backend.enable_padding(pad_id=1, pad_token="<pad>")
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def beyond(self, rows: int) -> list[str]:
        """Tokens whose ids an embedding of so many rows lacks, in the order of their ids."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return sorted((t for t, i in vocabulary.items() if i >= rows), key=vocabulary.__getitem__)

    def limit(self, rows: int) -> None:
        """Refuses texts from now on whose ids an embedding of so many rows lacks.

        Looked up beyond its end, an embedding gives numbers that are not finite.
        """
        self._rows = rows

    def _check(self, ids: Sequence[int], text: str) -> None:
        if self._rows is not None and max(ids, default=0) >= self._rows:
            tokens = [self._backend.id_to_token(i) for i in ids if i >= self._rows]
            raise DataError(
                f"{text!r} holds the tokens {tokens[:5]}, beyond the {self._rows} rows of the "
                "model's vocabulary (its embedding): this is another model's tokenizer, or tokens "
                "were added to it and the embedding was not resized"
            )

    def has_token(self, token: str) -> bool:
        """Whether a token is in the vocabulary."""
        return self._backend.token_to_id(token) is not None

    def token_id(self, token: str) -> int:
        """Id of one token.

        Raises:
            KeyError: the vocabulary lacks it.
        """
        number = self._backend.token_to_id(token)
        if number is None:
            raise KeyError(f"the tokenizer has no token {token!r}")
        return number

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it is, with nothing before or behind it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    @property
    def stop_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            KeyError: the vocabulary has none of the usual names.
        """
        return self.token_id(next(filter(self.has_token, _ENDS), _ENDS[0]))

    def encode(
        self, text: str, length: int
    ) -> tuple[Int32[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
        """Ids padded on the right to `length`, and the mask of real tokens.

        Raises:
            TextLengthError: `text` needs more columns; says how many more.
            DataError: it holds tokens beyond `limit`.
        """
        tokens = self._backend.encode(text).ids
        self._check(tokens, text)
        if len(tokens) > length:
            excess = len(tokens) - length
            raise TextLengthError(
                f"{text!r} has {len(tokens)} tokens, {excess} more than the {length} text columns; "
                "raise model.structure.text_len"
            )
        ids = np.full(length, self.pad_id, np.int32)
        ids[: len(tokens)] = tokens
        return ids, np.arange(length) < len(tokens)

    def encode_answers(
        self, parts: Sequence[tuple[str, bool]], length: int
    ) -> tuple[Int32[np.ndarray, "t"], Bool[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
        """A text of which only some parts are to be predicted, cut after `length` tokens.

        The parts are joined and tokenized as one, so that tokens at their borders are those of
        inference. A token belongs to a part if any of its characters does; the tokenizer's own end
        token belongs to the last part.

        Args:
            parts: text, and whether it is an answer.
            length: columns of the result.

        Returns:
            Ids padded on the right, the mask of real tokens, the mask of answers' tokens.
        """
        encoding = self._backend.encode("".join(text for text, _ in parts))
        self._check(encoding.ids, "".join(text for text, _ in parts))
        spans, end = [], 0
        for text, answer in parts:
            spans.append((end, end + len(text), answer))
            end += len(text)
        wanted = [
            any(answer and start < b and a < stop for start, stop, answer in spans)
            for a, b in encoding.offsets
        ]
        # The tokenizer's own end token has no characters, so no span reaches it.
        if encoding.special_tokens_mask and encoding.special_tokens_mask[-1] and len(wanted) > 1:
            wanted[-1] = bool(parts) and parts[-1][1]
        count = min(length, len(encoding.ids))
        ids, target = np.full(length, self.pad_id, np.int32), np.zeros(length, bool)
        ids[:count], target[:count] = encoding.ids[:count], wanted[:count]
        return ids, np.arange(length) < count, target


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False


def _class_of(folder: Path, usual: Any) -> Any:
    """The class that reads a folder: by its model type the usual one finds a wrong one at times.

    Kosmos-2 comes with XLM-RoBERTa's tokenizer, and as no class is registered for its type, one is
    taken that cannot convert a sentencepiece file.
    """
    import transformers

    named = _settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if str(named).startswith("XLMRobertaTokenizer"):
        return transformers.XLMRobertaTokenizer
    return usual


def _refuse_pointers(folder: Path) -> None:
    """Names files that are not what they should be before some library reads them.

    Raises:
        ValueError: there are pointers of Git LFS.
    """
    # Without `git lfs pull` a clone has pointers, on which the libraries' messages mislead.
    for path in sorted(folder.glob("*")):
        named = path.name in _PAIRS or "token" in path.name or ".model" in path.name
        if named and path.is_file() and is_pointer(path):
            raise ValueError(f"{path}: {explain_file(path)}")


def _with_tokens(backend: _Backend, added: Iterable[str]) -> _Backend:
    missing = [token for token in added if backend.token_to_id(token) is None]
    backend.add_special_tokens([AddedToken(token, special=True) for token in missing])
    return backend


def _byte_level(folder: Path) -> _Backend:
    """Byte-level BPE as GPT-2's; texts are `<s> ... </s>` if the vocabulary has these (BART)."""
    files = (str(folder / name) for name in _PAIRS)
    try:
        backend = _Backend(models.BPE.from_file(*files))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{folder}: its {' and '.join(_PAIRS)}: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    vocabulary = backend.get_vocab()
    specials = (*SPECIALS, "<mask>", "<|endoftext|>")
    added_tokens = [AddedToken(name, special=True) for name in specials if name in vocabulary]
    backend.add_special_tokens(added_tokens)
    if {"<s>", "</s>"} <= set(vocabulary):
        # RobertaProcessing takes the end token first, then the start token.
        ends = [(token, vocabulary[token]) for token in ("</s>", "<s>")]
        backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)  # type: ignore[assignment]
    return backend


def _plain(backend: _Backend, plain: bool) -> _Backend:
    # The post-processor is what puts start and end tokens around a text.
    if plain:
        backend.post_processor = None  # type: ignore[assignment]
    return backend


def _pad_token(folder: Path) -> str | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = _settings(folder / name).get("pad_token")
        if not token:
            continue
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise ValueError(f"{folder / name}: pad_token is {token!r}, no token")
        return text
    return None


def _settings(path: Path) -> dict[str, Any]:
    """The JSON object in one of the small files beside a tokenizer; {} where there is none.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {explain_file(path) or f'not JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
    return content
