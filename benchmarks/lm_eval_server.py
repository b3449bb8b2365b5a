"""lm-eval's number through `melinoe serve` beside the number that the model object gives.

    pip install 'lm-eval[api]'
    python benchmarks/lm_eval_server.py --model tiny --output lm-eval.json

The same task, rows and settings (greedy, the answer ends at a line end): once with lm-eval's completions
against a server with four clients at once, once with lm-eval's own HFLM around the model that `melinoe.load`
returns. Tasks that score given answers by likelihood need `echo` with logprobs, which the server refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import melinoe
from common import begin, parser_of, temporary_folder, write_result
from melinoe.data.rows import read_rows
from melinoe.runtime.load import load_tokenizer
from serving import server, server_options

CLIENTS = 4


def main() -> None:
    parser = parser_of(__doc__)
    server_options(parser)
    parser.add_argument("--data", default="tiny")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    options = begin(parser)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rows = []
    with temporary_folder("lm-eval") as folder:
        task = _task(options, folder)
        model = melinoe.load(options.model, slots=options.slots)
        tokenizer = load_tokenizer(options.model)
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        rows.append({"model": "HFLM(melinoe.load)", **_score(own, task)})
        tokenizer.save_pretrained(folder / "tokenizer")
        with server(options, "batched", CLIENTS, folder / "log") as url:
            remote = LocalCompletionsAPI(
                base_url=f"{url}/v1/completions",
                model="model",
                tokenizer_backend="huggingface",
                tokenizer=str(folder / "tokenizer"),
                tokenized_requests=False,
                num_concurrent=CLIENTS,
                max_retries=1,
            )
            rows.append({"model": "local-completions", **_score(remote, task)})
    said = [row.pop("answers") for row in rows]
    for row in rows:
        print(json.dumps(row), flush=True)
    same = sum(one == other for one, other in zip(*said, strict=True))
    print(f"{same} of {len(said[0])} answers are the same text")
    write_result(options, rows=rows, same_answers=same, answers=len(said[0]))


def _task(options: Any, folder: Path) -> dict[str, Any]:
    rows = read_rows(options.data, "test", limit=options.limit)
    made = [
        {"prompt": row.messages[-1]["content"], "answer": row.completion.strip().split("\n")[0]}
        for row in rows
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}\n",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": options.tokens},
        "metric_list": [{"metric": "exact_match"}],
    }


def _score(model: Any, task: dict[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found = simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["rows"], key=lambda sample: sample["doc_id"])
    return {
        "exact_match": found["results"]["rows"]["exact_match,none"],
        "answers": [sample["resps"][0][0] for sample in samples],
    }


if __name__ == "__main__":
    main()
