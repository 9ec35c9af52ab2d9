"""The zoo's table: chats, and where texts begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from tests.zoo import vocabularies, weights
from tests.zoo.entry import Entry
from tests.zoo.table_of_tokenizers import added, of_json, of_merges
from tests.zoo.vocabularies import END, byte_level, save_json, write_json


def dialogue(folder: Path) -> None:
    """DialoGPT: every turn ends with the end-of-text token."""
    of_merges(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": END})
    weights.ends(folder, config=0, generation=0, bos=0)


def dialogue_of_gpt2(folder: Path) -> None:
    """DialoGPT as it is published: GPT-2's own vocabulary and a template of its turns."""
    size = vocabularies.save_gpt2s(folder)
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END, "chat_template": template}
    write_json(folder / "tokenizer_config.json", config)
    weights.gpt2(folder, size, n_embd=16)
    weights.ends(folder, config=size - 1, bos=size - 1)


TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)


def chat(folder: Path) -> None:
    of_json(folder, added(), chat_template=TEMPLATE)


def chat_in_a_file(folder: Path) -> None:
    of_json(folder, added())
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


#: A prompt whose text ends.
ENDED = "The river runs"


def _exchange(folder: Path, one: int, other: int) -> None:
    """Exchange two rows of the embedding, so that the model writes one token where it wrote the other."""

    def exchanged(tensors: weights.Tensors) -> weights.Tensors:
        table = tensors["transformer.wte.weight"]
        table[[one, other]] = table[[other, one]]
        return tensors

    weights.rename(folder, exchanged)


def ended(where: str) -> Callable[[Path], None]:
    """A model whose end of text is what it writes after a few tokens; `where` says which file has it."""

    def build(folder: Path) -> None:
        from tests.zoo.reference import written

        of_json(folder, byte_level(specials=(END, "<end>")))
        tokens = written(folder, ENDED, 10)
        end, other = tokens[2], tokens[1]
        if where == "tokenizer":
            _exchange(folder, end, 1)
            save_json(Tokenizer.from_file(str(folder / "tokenizer.json")), folder, eos_token="<end>")
        weights.ends(
            folder,
            config={"config": end, "both": 3}.get(where),
            generation={"generation": end, "list": [5, end, other], "both": end}.get(where),
        )

    return build


TURNS = ({"role": "user", "content": "How are you?"},)
MORE_TURNS = (*TURNS, {"role": "bot", "content": "Fine. "}, {"role": "user", "content": "And <user>?"})

ENDS = (
    Entry("dialogue", dialogue, "DialoGPT's turns", prompts=(f"How are you?{END}Fine.{END}", "")),
    Entry(
        "dialogue-of-gpt2",
        dialogue_of_gpt2,
        "DialoGPT's turns on GPT-2's own vocabulary",
        prompts=(f"How are you?{END}Fine.{END}", ""),
        chats=(TURNS, (*TURNS, {"role": "bot", "content": "Fine."}, *TURNS)),
    ),
    Entry("chat", chat, "chat_template in tokenizer_config.json", chats=(TURNS, MORE_TURNS), quick=True),
    Entry("chat-file", chat_in_a_file, "chat_template.jinja", chats=(TURNS, MORE_TURNS)),
    Entry("eos-in-config", ended("config"), "eos_token_id in config.json", stops=True, prompts=(ENDED,)),
    Entry(
        "eos-in-generation-config",
        ended("both"),
        "eos_token_id in generation_config.json, another in config.json",
        stops=True,
        prompts=(ENDED,),
        quick=True,
    ),
    Entry("eos-list", ended("list"), "a list of eos_token_id", stops=True, prompts=(ENDED,)),
    Entry("eos-of-tokenizer", ended("tokenizer"), "eos_token of the tokenizer alone", stops=True, prompts=(ENDED, "")),
)
