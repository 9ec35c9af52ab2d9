"""Compute a file of prompts into a file of results: `python examples/bulk_over_a_file.py prompts.jsonl results.jsonl`.

Run it again after an interruption: rows that are already in the output are kept, the others are computed.
"""

import json
import sys
from pathlib import Path

from headrace import client


def main(source: str, target: str) -> None:
    report = client.batch(source, target, params={"max_tokens": 12, "temperature": 0}, resume=Path(target).exists())
    print(f"{report.before} rows were done before, {report.succeeded} were computed, {report.failed} failed")
    with open(target) as rows:
        for row in map(json.loads, rows):
            response = row["response"]
            if response and response["status_code"] == 200:
                print(row["custom_id"], repr(response["body"]["choices"][0]["text"]))
            else:  # a request that could never be computed has a response with an error, as over HTTP
                error = row["error"] or response["body"]["error"]
                print(row["custom_id"], "failed:", error["message"])


if __name__ == "__main__":
    main(*sys.argv[1:])
