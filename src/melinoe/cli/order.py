"""The verbs in the order in which one uses them, with an example of each; `melinoe --help` shows them."""

from __future__ import annotations

EXAMPLES = {
    "demo": "melinoe demo",
    "plan": "melinoe plan --model M --memory 8GiB",
    "generate": "melinoe generate --model M --memory 8GiB -p 'Why is the sky blue?'",
    "chat": "melinoe chat --model M --memory 8GiB",
    "serve": "melinoe serve --model M --memory 8GiB --port 8000",
    "bench": "melinoe bench --model M --memory 8GiB",
    "sticky": "melinoe sticky --model M --data rows.jsonl",
    "tune": "melinoe tune --model M --data rows.jsonl --output-dir adapter",
    "evaluate": "melinoe evaluate --model M --adapter adapter --data rows.jsonl",
    "merge": "melinoe merge --model M --adapter adapter --output-dir tuned",
    "trace": "melinoe trace --model tuned --data rows.jsonl --output t.trace",
    "fit-predictor": "melinoe fit-predictor --model tuned --trace t.trace --output predictor",
    "simulate": "melinoe simulate t.trace --slots 8,16,32",
    "placement": "melinoe placement t.trace --output placement.json",
    "convert": "melinoe convert tuned store --format int4",
    "verify": "melinoe verify store",
}
