"""3,000 texts on which tokenizers are compared: languages, code, spaces, controls, and tokens of many vocabularies."""

from __future__ import annotations

import functools
import random

SENTENCES = [
    "The quick brown fox jumps over the lazy dog",
    "I'm you're we've she'll he'd it's can't I'M DON'T 'tis ''s",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "東京都に行きました。Москва — столица. القاهرة مدينة नमस्ते दुनिया 한국어 문장 ελληνικά עברית ภาษาไทย",
    "def f(x):\n    return [i**2 for i in range(10)]  # squares\n\n\tif x:\r\n        pass",
    "1234567890 3.14 1,000,000 ½ ² Ⅷ ٣ -5e-3 0xFF",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u00a0nbsp \u3000wide \u200bzero \ufeffbom \u2028line \x85next",
    "  two  spaces   three\t\ttabs \n newline \r\n\r\n\n\n end   ",
    "https://example.org/a?b=c&d=%20#e_f-g <p>html</p> {json: [1, 2]}",
    "ÀÉÎÕÜ àéîõü ß ﬁ ﬂ Å Ω \uff46\uff55\uff4c\uff4c ① ㍿ İi ǅ",
    "\x00\x01\x1f\x7f control \ud7ff\ue000\uffff \U0010ffff",
    "he said , \" do not go ! \" it ' s n't 've . ? ##ing ▁under <0x41> </w> Ġ Ċ",
]
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "[CLS]",
    "[MASK]",
    "the",
    " the",
    "hello",
    "<tool>",
    "hell",
    "é",
    "ĠThe",
    "<|",
    "|>",
]


@functools.cache
def strings(count: int = 3_000) -> list[str]:
    """The texts: always the same."""
    draw = random.Random(18)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")] + TOKENS
    alphabets = ["abc DEF'stre ", " \t\n\r\u00a0", "aé漢🙂 1½.,!", "0123456789 .", "".join(map(chr, range(32, 700)))]
    made = ["", " ", "   ", "\n", "a" * 300 + " " * 300 + "!?" * 100, *SENTENCES, *TOKENS]
    made += [f"a{token}{other}" for token in TOKENS for other in (" b", "b", " ", token, "\n")]
    while len(made) < count:
        if draw.random() < 0.5:
            joint = draw.choice([" ", " ", "", "  ", "\n"])
            made.append(joint.join(draw.choices(words, k=draw.randint(1, 12))))
        elif draw.random() < 0.3:
            made.append(
                "".join(
                    chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))
                    for _ in range(draw.randint(1, 8))
                )
            )
        else:
            made.append("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 60))))
    return made[:count]
