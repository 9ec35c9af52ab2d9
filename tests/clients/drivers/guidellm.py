"""guidellm's own load: some requests at once, of which none may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

backend = f"kind=openai_http,target={os.environ['SERVER']},model=demo,request_format=/v1/completions"
command = [
    *(str(Path(sys.executable).parent / "guidellm"), "run", "--backend", backend),
    *("--profile", "kind=throughput,max_concurrency=16", "--constraint", "kind=max_requests,count=40"),
    *("--tokenizer", f"kind=hf_auto,model={os.environ['MODEL']}"),
    *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
    *("--output", "kind=json,path=report.json", "--disable-console"),
]
subprocess.run(command, check=True, timeout=600)
found = json.loads(Path("report.json").read_text())["benchmarks"][0]
totals = found["metrics"]["request_totals"]
assert totals["successful"] >= 40 and not totals["errored"], totals
print(f"{totals['successful']} requests of 32 + 16 tokens, 16 at once, {totals['errored']} errors")
