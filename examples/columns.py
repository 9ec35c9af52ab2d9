"""Complete the prompts in a column of a table and add a column with the texts: `datasets`, pandas and pyarrow.

`client.map` takes any iterable and yields results in order. It reads at most `max_inflight` rows ahead, so that it can
stream tables that do not fit into memory.
"""

from collections.abc import Iterable
from typing import Any

import datasets
import pandas
import pyarrow

from headrace import client

PROMPTS = ["The old house", "The river", "Alice was"]


def texts(column: Iterable[Any]) -> list[str]:
    return [result.text for result in client.map(column, max_tokens=6, temperature=0)]


def main() -> None:
    frame = pandas.DataFrame({"prompt": PROMPTS})
    frame["text"] = texts(frame["prompt"])
    print(frame.to_string(index=False))

    table = pyarrow.table({"prompt": PROMPTS})
    table = table.append_column("text", [texts(table["prompt"])])
    print(table.column_names, table.num_rows)

    dataset = datasets.Dataset.from_dict({"prompt": PROMPTS})
    dataset = dataset.add_column("text", texts(dataset["prompt"]))
    print(dataset[0])

    assert frame["text"].tolist() == table["text"].to_pylist() == list(dataset["text"])


if __name__ == "__main__":
    main()
