"""The tokenizer: trained once on the training documents, or loaded from a file."""

import functools
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pallas_kernels.files import write_atomically
from train.data.store import Specials, digest

DEFAULT_VOCAB_SIZE = 8192
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_TEXT = "<|endoftext|>"
SPECIALS = {"mlm": BERT_SPECIALS, "clm": (END_OF_TEXT,)}
# Names under which published tokenizers keep the same roles.
ALIASES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "end_of_text": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]"),
}
_ROLES = {"mlm": ("pad", "cls", "sep", "mask"), "clm": ("end_of_text",)}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer together with the special ids that an objective needs.

    Attributes:
      tokenizer: the ``tokenizers.Tokenizer``.
      objective: "mlm" or "clm".
      specials: ids of the special tokens.
    """

    tokenizer: tokenizers.Tokenizer
    objective: str
    specials: Specials

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        return digest(self.to_json(), asdict(self.specials))

    def to_json(self) -> str:
        return self.tokenizer.to_str()

    def copy(self) -> tokenizers.Tokenizer:
        """Another tokenizer of the kind, for others to change."""
        return tokenizers.Tokenizer.from_str(self.to_json())

    @functools.cached_property
    def with_special_tokens(self) -> tokenizers.Tokenizer:
        """Of the kind, but what spells a special token in a text is that token."""
        tokenizer = self.copy()
        tokenizer.encode_special_tokens = False
        return tokenizer

    def save(self, path: Path | str) -> None:
        """Writes ``tokenizer.json``: the old file or the new one, never a part."""
        write_atomically(Path(path), self.to_json())

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def train_tokenizer(
    texts: Iterable[str], objective: str, vocab_size: int = DEFAULT_VOCAB_SIZE
) -> Vocabulary:
    """Trains a byte-level BPE: any text encodes without unknowns and decodes to itself.

    The same texts give the same bytes. Special tokens get the first ids: [PAD] [UNK] [CLS] [SEP]
    [MASK] for "mlm", <|endoftext|> for "clm".

    Raises:
      ValueError: ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
    """
    specials = SPECIALS[objective]
    smallest = 256 + len(specials)
    if vocab_size <= smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: byte-level BPE starts from 256 bytes and "
            f"{len(specials)} special tokens, so give more than {smallest}, for example "
            f"{DEFAULT_VOCAB_SIZE}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _vocabulary(tokenizer, objective, "the trained tokenizer")


def load_tokenizer(path: Path | str, objective: str, end_of_text: int | None = None) -> Vocabulary:
    """Reads a ``tokenizer.json``, or a BERT ``vocab.txt`` as uncased WordPiece.

    Args:
      end_of_text: the id of "clm", where it is known; None: of the token that goes by such a name.

    Raises:
      ValueError: no such file, not a tokenizer, or without the special tokens of the objective.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not names:
            raise ValueError(f"tokenizer {path}: the folder has no tokenizer.json and no vocab.txt")
        path = path / names[0]
    if not path.is_file():
        raise ValueError(f"tokenizer {path}: no such file; give a tokenizer.json or a vocab.txt")
    tokenizer = _word_piece(path) if path.suffix == ".txt" else _from_json(path)
    return _vocabulary(tokenizer, objective, f"tokenizer {path}", end_of_text)


def vocabulary_from_json(text: str, objective: str, end_of_text: int | None = None) -> Vocabulary:
    """The inverse of ``Vocabulary.to_json``; `end_of_text` as of `load_tokenizer`."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    return _vocabulary(tokenizer, objective, "tokenizer", end_of_text)


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # The library raises bare Exception for anything it cannot parse.
        raise ValueError(
            f"tokenizer {path}: not a tokenizer.json of the tokenizers library ({error})"
        ) from error


def _word_piece(path: Path) -> tokenizers.Tokenizer:
    try:
        entries = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer {path}: a vocab.txt must be UTF-8 text ({error})") from error
    vocab = {entry: index for index, entry in enumerate(entries)}
    missing = [name for name in BERT_SPECIALS if name not in vocab]
    if missing or len(vocab) != len(entries):
        what = f"lacks {', '.join(missing)}" if missing else "repeats an entry"
        raise ValueError(
            f"tokenizer {path}: the vocab.txt {what}; a BERT vocabulary has one different token a "
            f"line and holds {' '.join(BERT_SPECIALS)}"
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT_SPECIALS))
    return tokenizer


def _vocabulary(
    tokenizer: tokenizers.Tokenizer, objective: str, name: str, end_of_text: int | None = None
) -> Vocabulary:
    ids = {} if end_of_text is None else {"end_of_text": end_of_text}
    for role in (role for role in _ROLES[objective] if role not in ids):
        found = [tokenizer.token_to_id(token) for token in ALIASES[role]]
        found = [index for index in found if index is not None]
        if not found:
            raise ValueError(
                f"{name} has no token for {role}, which objective {objective} needs: add one of "
                f"{' '.join(ALIASES[role])}, or leave --tokenizer out to train one"
            )
        ids[role] = found[0]
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token in ALIASES["unk"]:
        if (unknown := tokenizer.token_to_id(token)) is not None:
            special.add(unknown)
    # Text that happens to spell a special token, "[MASK]" in a manual say, must stay text; and
    # what a published file says about truncation and padding is not meant for whole corpora.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    specials = Specials(all=tuple(sorted(special | set(ids.values()))), **ids)
    return Vocabulary(tokenizer, objective, specials)
