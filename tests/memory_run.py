"""One generation in a process of its own, for tests/test_memory.py: what it took beyond what it began with.

    python memory_run.py LIMIT_FILE FOLDER MEMORY ROWS PROMPT NEW

With LIMIT_FILE not "-", the process limits its own cgroup to what it has and MEMORY, before it opens the
model. What it has are Python and its libraries, imported.
"""

import json
import sys
from pathlib import Path

import torch

from melinoe.machine import peak_memory, resident_memory
from melinoe.runtime.load import load

limit_file, folder = sys.argv[1:3]
memory, rows, prompt, new = map(int, sys.argv[3:7])
torch.set_num_threads(1)
before = resident_memory()
if limit_file != "-":
    Path(limit_file).write_text(str(before + memory))
model = load(folder, memory=memory, context=prompt + new, batch=rows)
ids = torch.randint(3, 60, (rows, prompt), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[:1, : prompt // 3] = 0  # padding: with it attention needs a mask
pieces = {"prefill_chunk_size": model.melinoe_budget.pass_tokens} if rows == 1 else {}
model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **pieces)
print(json.dumps({"taken": peak_memory() - before, "slots": model.melinoe_budget.slots}))
