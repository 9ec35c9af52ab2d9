"""Sort texts into classes in one line: the likeliest of the given answers after each prompt, by its score.

`client.choose` takes one prompt, a list or a column of a table. It compares the log probabilities of the answers; no
text is generated. `normalize="byte"` compares answers of different lengths fairly.
"""

import pandas

from headrace import client

REVIEWS = ["I laughed all the way home.", "The rain came in and nobody said a word."]


def main() -> None:
    frame = pandas.DataFrame({"review": REVIEWS}, index=["a", "b"])
    prompts = frame["review"] + " He was"
    frame["mood"] = client.choose(prompts, [" happy", " sad"], normalize="byte")
    print(frame.to_string())

    scores = [client.score(prompts["a"], answer) for answer in (" happy", " sad")]
    print([round(score.logprob, 2) for score in scores])
    best = max(scores, key=lambda score: score.normalized("byte"))
    assert frame["mood"]["a"] == [" happy", " sad"][scores.index(best)]


if __name__ == "__main__":
    main()
