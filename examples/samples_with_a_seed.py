"""Draw several samples of one prompt, and reproduce them with the seed that the result reports."""

from headrace import client


def main() -> None:
    first = client.submit("The miller said", n=4, temperature=0.9, max_tokens=10).result(timeout=60)
    for choice in first.choices:
        print(choice.index, repr(choice.text))

    again = client.submit("The miller said", n=4, temperature=0.9, max_tokens=10, seed=first.seed).result(timeout=60)
    assert [choice.text for choice in again.choices] == [choice.text for choice in first.choices]
    print("the same again with seed", first.seed)

    fewer = client.submit("The miller said", n=2, temperature=0.9, max_tokens=10, seed=first.seed).result(timeout=60)
    assert [choice.text for choice in fewer.choices] == [choice.text for choice in first.choices[:2]]
    print("and the first two of them with n=2")


if __name__ == "__main__":
    main()
