"""The zoo's table: tokenizers of other people's making, and where their texts end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from tests.zoo import vocabularies, weights
from tests.zoo.entry import Entry, Made
from tests.zoo.vocabularies import END, MIXED, RUSSIAN, byte_level, save_json, save_merges, write_json

#: Added tokens: two special ones, one that is not, one that takes the spaces around it, one that is a whole word only.
ADDED = (
    AddedToken("<user>", special=True),
    AddedToken("<bot>", special=True),
    AddedToken("covfefe", special=False, normalized=False),
    AddedToken("<wide>", special=True, lstrip=True, rstrip=True),
    AddedToken("mill", special=False, single_word=True),
)
ADDED_PROMPTS = (
    "<user>How are you?<bot>",
    "a covfefe, the covfefes",
    "left  <wide>  right",
    "the mill and the miller",
    f"one{END}two",
)


def of_json(folder: Path, made: Tokenizer, **config: Any) -> None:
    """A model whose tokenizer is a tokenizer.json."""
    weights.gpt2(folder, save_json(made, folder, **config))


def of_merges(folder: Path, made: Tokenizer | None = None, **stored: Any) -> None:
    """A model whose tokenizer is a vocab.json and a merges.txt; `stored` goes to `save_merges`."""
    weights.gpt2(folder, save_merges(made or byte_level(), folder, **stored))


def added() -> Tokenizer:
    made = byte_level()
    for token in ADDED:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


def special_written(folder: Path) -> None:
    """Most tokens are special or added, so that outputs contain them."""
    made = byte_level()
    made.add_special_tokens([f"<{i}>" for i in range(200)])
    made.add_tokens([f"[{i}]" for i in range(100)])
    of_json(folder, made)


def added_beside_merges(folder: Path) -> None:
    """added_tokens.json, special_tokens_map.json and tokenizer_config.json beside vocab.json and merges.txt."""
    made = byte_level()
    size = save_merges(made, folder)
    texts = [token.content for token in ADDED]
    write_json(folder / "added_tokens.json", {text: size + i for i, text in enumerate(texts)})
    write_json(
        folder / "special_tokens_map.json",
        {
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END),
            "additional_special_tokens": [token.content for token in ADDED if token.special],
        },
    )
    decoder = {
        str(size + i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in enumerate(ADDED)
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, "eos_token": END, "bos_token": END}
    write_json(folder / "tokenizer_config.json", config)
    weights.gpt2(folder, size + len(ADDED))


def added_as_json_alone(folder: Path) -> None:
    """As transformers 4 wrote them: added_tokens.json and special_tokens_map.json, no tokenizer_config.json."""
    size = save_merges(byte_level(), folder)
    write_json(folder / "added_tokens.json", {"<user>": size, "covfefe": size + 1})
    write_json(folder / "special_tokens_map.json", {"eos_token": END, "additional_special_tokens": ["<user>"]})
    weights.gpt2(folder, size + 2)


def ordinary_added(folder: Path) -> None:
    """An added token that is also a token of the vocabulary, which merges make."""
    made = byte_level()
    word = max(made.get_vocab(), key=lambda token: (token.isascii() and token.isalpha(), len(token), token))
    made.add_tokens([AddedToken(word, normalized=False)])
    of_json(folder, made)


def ordinary_added_beside_merges(folder: Path) -> None:
    """added_tokens.json names tokens that vocab.json has too."""
    made = byte_level()
    of_merges(folder, made)
    words = sorted(token for token in made.get_vocab() if token.isascii() and token.isalpha() and len(token) > 2)
    write_json(folder / "added_tokens.json", {word: made.token_to_id(word) for word in words[:8]})


def gpt2s(folder: Path, *added: str) -> None:
    """GPT-2's own vocabulary, and special tokens that were added to it."""
    size = vocabularies.save_gpt2s(folder)
    if added:
        write_json(folder / "added_tokens.json", {text: size + i for i, text in enumerate(added)})
        write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(added)})
    weights.gpt2(folder, size + len(added), n_embd=16)


def both_layouts(folder: Path) -> None:
    made = added()
    save_merges(made, folder)
    of_json(folder, made)


def bos_in_template(folder: Path) -> None:
    made = byte_level(specials=(END, "<s>"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    of_json(folder, made, bos_token="<s>")


def digits(folder: Path) -> None:
    """Digits one by one, no regular expression of GPT-2's."""
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    of_json(folder, made)


def normalized(folder: Path) -> None:
    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    of_json(folder, made)


def ignored_merges(folder: Path) -> None:
    """A whole word that no merges make, found by ignore_merges."""
    made = byte_level()
    vocabulary = json.loads(made.to_str())["model"]["vocab"]
    vocabulary |= {"ĠZanzibar": len(vocabulary), "Qwxz": len(vocabulary) + 1}
    of_json(folder, vocabularies.edit(made, {"model": {"ignore_merges": True, "vocab": vocabulary}}))


def two_merges(folder: Path) -> None:
    """Two merges that make one token, of which the later one is what the text needs."""
    made = byte_level()
    model = json.loads(made.to_str())["model"]
    vocabulary, pairs = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for whole in ("QX", "XZ", "QXZ"):
        vocabulary[whole] = len(vocabulary)
    pairs += [("X", "Z"), ("QX", "Z"), ("Q", "XZ")]
    of_merges(folder, vocabularies.edit(made, {"model": {"vocab": vocabulary, "merges": pairs}}))


def configured_merges(folder: Path, **config: Any) -> None:
    """tokenizer_config.json beside vocab.json and merges.txt."""
    of_merges(folder)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END, **config},
    )


def marked_merges(folder: Path) -> Made:
    """merges.txt with a byte order mark, at which transformers fails: the reference is the same file without it."""
    of_merges(folder)
    twin = folder.with_name(f"{folder.name}.twin")
    shutil.copytree(folder, twin)
    save_merges(byte_level(), folder, mark="\ufeff")
    return Made(folder, twin)


def resized(folder: Path) -> None:
    """`add_special_tokens` and `resize_token_embeddings`, as fine-tuning does it."""
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    of_json(folder, byte_level())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.add_tokens(["covfefe"])
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=64)
    tokenizer.save_pretrained(folder)
    weights.save(model, folder)


TOKENIZERS = (
    Entry("russian", lambda f: of_json(f, byte_level(RUSSIAN, 400)), "byte-level BPE of Russian", prompts=RUSSIAN),
    Entry(
        "mixed-scripts",
        lambda f: of_merges(f, byte_level(MIXED, 400)),
        "byte-level BPE of five scripts, vocab and merges",
        prompts=MIXED,
        quick=True,
    ),
    Entry(
        "added-tokens",
        lambda f: of_json(f, added()),
        "added tokens in tokenizer.json",
        prompts=ADDED_PROMPTS,
        quick=True,
    ),
    Entry("added-beside-merges", added_beside_merges, "added tokens in added_tokens_decoder", prompts=ADDED_PROMPTS),
    Entry("added-alone", added_as_json_alone, "added_tokens.json and special_tokens_map.json", prompts=ADDED_PROMPTS),
    Entry(
        "added-ordinary",
        ordinary_added,
        "an added token that is also an ordinary one",
        prompts=("The river, rivers", "unriver houses householder"),
    ),
    Entry(
        "added-ordinary-beside-merges",
        ordinary_added_beside_merges,
        "added_tokens.json with ordinary tokens",
        prompts=("The river, rivers", "unriver houses householder"),
    ),
    Entry(
        "gpt2-vocabulary",
        gpt2s,
        "GPT-2's own vocabulary",
        prompts=(f"one{END}two", *RUSSIAN[:1]),
        reads_special_tokens=False,
    ),
    Entry(
        "gpt2-vocabulary-added",
        lambda f: gpt2s(f, "<user>", "<bot>"),
        "GPT-2's own vocabulary and added tokens",
        prompts=(f"one{END}two", "<user>How are you?<bot>"),
    ),
    Entry(
        "special-as-text",
        lambda f: of_json(f, added()),
        "parse_special_tokens false",
        prompts=ADDED_PROMPTS,
        request={"parse_special_tokens": False},
    ),
    Entry(
        "special-kept",
        special_written,
        "skip_special_tokens false",
        prompts=ADDED_PROMPTS,
        request={"skip_special_tokens": False},
        quick=True,
    ),
    Entry("special-left-out", special_written, "a model that writes special tokens", prompts=ADDED_PROMPTS),
    Entry("both-layouts", both_layouts, "tokenizer.json beside vocab.json and merges.txt", prompts=ADDED_PROMPTS),
    Entry("resized", resized, "resize_token_embeddings to a multiple of 64", prompts=ADDED_PROMPTS, quick=True),
    Entry(
        "padded-embedding", lambda f: weights.gpt2(f, 384 + 0 * save_json(byte_level(), f)), "64 rows that no token has"
    ),
    Entry(
        "post-processor-left-out",
        bos_in_template,
        "add_special_tokens false",
        prompts=("<s>Hello",),
        request={"add_special_tokens": False},
    ),
    Entry("digits", digits, "another pre_tokenizer", prompts=("in 1998 for 120", "  x\n\n y 7")),
    Entry("normalized", normalized, "a normalizer", prompts=("ＴＨＥ River ﬁne ①",)),
    Entry(
        "post-processor", bos_in_template, "a post_processor that begins with <s>", quick=True, prompts=("", "<s>Hello")
    ),
    Entry(
        "prefix-space",
        lambda f: of_json(f, byte_level(spaced=True)),
        "add_prefix_space in tokenizer.json",
        prompts=("river", " river", "\nriver"),
    ),
    Entry("ignore-merges", ignored_merges, "ignore_merges", prompts=("in Zanzibar", "Qwxz Zanzibar")),
    Entry("two-merges", two_merges, "two merges that make one token", prompts=("QXZ QX XZ", "aQXZ")),
    Entry("merges-crlf", lambda f: of_merges(f, newline="\r\n"), "merges.txt with CRLF"),
    Entry("merges-bom", marked_merges, "merges.txt with a byte order mark"),
    Entry(
        "merges-prefix-space",
        lambda f: configured_merges(f, add_prefix_space=True),
        "add_prefix_space in tokenizer_config.json",
        prompts=("river", " river"),
        quick=True,
    ),
    Entry("merges-bos", lambda f: configured_merges(f, add_bos_token=True), "add_bos_token in tokenizer_config.json"),
)
