"""CLIP's byte-pair tokenizer through `tokenizers` alone: read from, and written as, a transformers tokenizer folder.

The vocabulary is Radford et al. 2021's: 256 byte symbols, the same with "</w>" (the end of a word), one token for each
merge, then the start and the end of text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class ClipTokenizer:
    """Text to ids as transformers' `CLIPTokenizer` makes them; padding and long texts are the encoder's business.

    prefix, suffix: the start and the end token; pad: the id behind the end; length: `model_max_length`, if known.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        length: int | None = None,
        bos: str = BOS,
        eos: str = EOS,
        pad: str = EOS,
        unknown: str = EOS,
        lower_case: bool = True,
        added: Mapping[int, AddedToken] | None = None,
    ):
        self.vocabulary, self.merges, self.length = dict(vocabulary), list(merges), length
        self.tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
        self.lower_case = lower_case
        self.backend = _backend(self.vocabulary, self.merges, unknown, lower_case)
        for i, token in sorted((added or {}).items()):
            self.backend.add_tokens([token])
            if self.backend.token_to_id(token.content) != i:
                raise ValueError(
                    f"added token {token.content!r}: got id {i}, expected {self.backend.token_to_id(token.content)}"
                )
        named = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        for content in self.tokens.values():
            if content not in named:
                self.backend.add_special_tokens([AddedToken(content, special=True)])
        self.prefix: tuple[int, ...] = (self._id(bos),)
        self.suffix: tuple[int, ...] = (self._id(eos),)
        self.pad = self._id(pad)
        self.backend.post_processor = processors.RobertaProcessing(
            (eos, self.suffix[0]), (bos, self.prefix[0]), trim_offsets=False, add_prefix_space=False
        )
        self._find_several()

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start, end and padding."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [piece for i in ids for piece in self._several.get(i, (i,))]

    def add_token(self, token: str, vectors: int = 1) -> list[int]:
        """Learns a word as one piece, or as several (token, token_1, token_2, … as diffusers names them); their ids.

        Raises ValueError when it is known already, or empty.
        """
        self.check_new({token: vectors})
        pieces = _pieces(token, vectors)
        self.backend.add_tokens([AddedToken(piece) for piece in pieces])
        self._find_several()
        return [self._id(piece) for piece in pieces]

    def check_new(self, tokens: Mapping[str, int]) -> None:
        """Raises ValueError when `add_token` could not learn these, each in so many vectors, one after the other."""
        clean: Any = self.backend.normalizer
        known = {clean.normalize_str(token.content) for token in self.backend.get_added_tokens_decoder().values()}
        for token, vectors in tokens.items():
            raw = _pieces(token, vectors + 1)  # and the one behind them
            pieces = [clean.normalize_str(piece) for piece in raw]
            there = [p for p in pieces + raw if p in known or self.backend.token_to_id(p) is not None]
            base, _, row = pieces[0].rpartition("_")
            why = "" if token.strip() else "it is empty"
            if there:
                why = f"{there[0]!r} is known to this tokenizer"
            elif base in known and row in map(str, range(1, 1 + len(known))) and known >= {*_pieces(base, int(row))}:
                why = f"it would be read as a further vector of {base!r}"
            if why:
                raise ValueError(f"token {token!r}: {why}; give another name, such as <my-token>")
            known.update(pieces[:-1])

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids)).replace(END_OF_WORD, " ").strip()

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 1500, *, length: int | None = None) -> "ClipTokenizer":
        """A vocabulary of at most `size` tokens learnt from `texts` (Sennrich et al. 2016), in CLIP's order."""
        # `sorted` is CLIP's own order: printable bytes stand for themselves, the others for code points from 256 on.
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        symbols += [symbol + END_OF_WORD for symbol in symbols]
        if size < len(symbols) + 2:
            raise ValueError(f"vocabulary: got {size} tokens, expected at least {len(symbols) + 2}: all bytes, twice")
        backend = _backend({}, [], None, lower_case=True)
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=size,
                min_frequency=2,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                end_of_word_suffix=END_OF_WORD,
            ),
        )
        tokens, merges = dict.fromkeys(symbols), []
        for first, second in json.loads(backend.to_str())["model"]["merges"]:
            if len(tokens) == size - 2:
                break
            tokens[first + second] = None
            merges.append((first, second))
        vocabulary = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
        return cls(vocabulary, merges, length=length)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ClipTokenizer":
        """Opens tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json where there is one.

        Raises ValueError when the files are missing, broken or not a byte-pair vocabulary.
        """
        folder = Path(folder)
        config = _json(folder / "tokenizer_config.json", {})
        whole = _json(folder / "tokenizer.json", {})
        try:
            added = {int(i): _token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
            model = whole.get("model") or _vocabulary_files(folder)
            if not added:  # as transformers before 4.34 wrote folders; there special_tokens_map.json has the last word
                config |= _json(folder / "special_tokens_map.json", {})
                special = {_content(config[name]): config[name] for name in NAMED if config.get(name)}
                for content, i in _json(folder / "added_tokens.json", {}).items():
                    added[i] = AddedToken(content, normalized=content not in special, special=content in special)
                added |= {token["id"]: _token(token) for token in whole.get("added_tokens", [])}
                for content, token in special.items():
                    if isinstance(token, dict) and content in model["vocab"]:
                        added.setdefault(model["vocab"][content], _token(token | {"special": True}))
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return cls(
                model["vocab"],
                [(first, second) for first, second in pairs],
                length=None if config.get("model_max_length") is None else int(config["model_max_length"]),
                bos=_content(config.get("bos_token") or BOS),
                eos=_content(config.get("eos_token") or EOS),
                pad=_content(config.get("pad_token") or EOS),
                unknown=_content(config.get("unk_token") or EOS),
                lower_case=config.get("do_lower_case", True),
                added=added,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if str(folder) in str(error):
                raise
            raise ValueError(
                f"{folder}: not a CLIP tokenizer (a byte-pair vocabulary and its merges): {error}"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `CLIPTokenizer.from_pretrained` opens, in both of the layouts in use."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        added = self.backend.get_added_tokens_decoder()
        config = {
            "tokenizer_class": "CLIPTokenizer",
            **self.tokens,
            "do_lower_case": self.lower_case,
            "model_max_length": self.length,
            "added_tokens_decoder": {
                str(i): {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
                for i, token in sorted(added.items())
            },
        }
        merges = "".join(f"{first} {second}\n" for first, second in self.merges)
        _write(folder / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
        _write(folder / "merges.txt", "#version: 0.2\n" + merges)
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        _write(folder / "tokenizer.json", self.backend.to_str(pretty=True))

    def _find_several(self) -> None:
        """Which ids stand for several: those of a token that has token_1, token_2, … beside it, as in diffusers."""
        ids = {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}
        self._several: dict[int, list[int]] = {}
        for token, i in ids.items():
            row = [i]
            while (more := ids.get(f"{token}_{len(row)}")) is not None:
                row.append(more)
            if len(row) > 1:
                self._several[i] = row

    def _id(self, token: str) -> int:
        i = self.backend.token_to_id(token)
        assert i is not None, token
        return i


def _pieces(token: str, vectors: int) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def _backend(vocabulary: dict[str, int], merges: list[Any], unknown: str | None, lower_case: bool) -> Tokenizer:
    backend = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, unk_token=unknown))
    clean: list[Any] = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
    backend.normalizer = normalizers.Sequence(clean + [normalizers.Lowercase()] * lower_case)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _vocabulary_files(folder: Path) -> dict[str, Any]:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ValueError(f"{folder}: no tokenizer here; expected tokenizer.json, or vocab.json and merges.txt")
    lines = merges.read_text(encoding="utf-8").split("\n")
    return {"vocab": _json(vocabulary, {}), "merges": [m for m in lines if m and not m.startswith("#version")]}


def _json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _token(fields: Mapping[str, Any]) -> AddedToken:
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in FLAGS if flag in fields})
