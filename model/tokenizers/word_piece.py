"""The tokenizer of vocab.txt, composed as the class BertTokenizer of transformers 5 composes it."""

from __future__ import annotations

from tokenizers import Tokenizer as Library
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from headrace.model.tokenizers import compose
from headrace.model.tokenizers.base import Described, Tokenizer
from headrace.model.tokenizers.described import describe
from headrace.model.tokenizers.files import BERT_DEFAULTS, Files, content
from headrace.model.tokenizers.json_file import digest_of
from headrace.model.tokenizers.library import LibraryTokenizer


def from_vocab_txt(files: Files) -> Tokenizer:
    """The WordPiece tokenizer of a directory with vocab.txt. Raises ModelError, which names the file."""
    path = files.folder / "vocab.txt"
    lines = files.text("vocab.txt").split("\n")
    vocabulary = {line.rstrip(): i for i, line in enumerate(lines if lines[-1] else lines[:-1])}
    named = files.special_tokens(default=BERT_DEFAULTS)
    lower = compose.flag(files, "do_lower_case") if files.settings.get("do_lower_case") is not None else True
    chinese = files.settings.get("tokenize_chinese_chars")
    accents = files.settings.get("strip_accents")
    made = Library(WordPiece(vocabulary, unk_token=content(named.get("unk_token"))))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese is None or compose.flag(files, "tokenize_chinese_chars"),
        strip_accents=None if accents is None else compose.flag(files, "strip_accents"),
        lowercase=lower,
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    compose.add_all(path, files, made, vocabulary, BERT_DEFAULTS)
    first, last = (content(named.get(f"{name}_token")) for name in ("cls", "sep"))
    ids = [(text, made.token_to_id(text)) for text in (first, last)]
    if all(i is not None for _, i in ids):
        compose.surround(path, made, [f"{first}:0", "$A:0", f"{last}:0"], dict(ids))
    described = describe(files, default=BERT_DEFAULTS)
    if compose.flag(files, "clean_up_tokenization_spaces"):
        note = "clean_up_tokenization_spaces was ignored: texts are what the tokenizer's own decoder gives"
        described = Described(described.special_tokens, described.chat_template, (note,))
    settings = [lower, chinese, accents, sorted((i, repr(t)) for i, t in made.get_added_tokens_decoder().items())]
    return LibraryTokenizer(made, digest_of([vocabulary, settings, ids]), described)
