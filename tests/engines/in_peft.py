"""Text from transformers with an adapter that peft loads: a JSON request on stdin, `ANSWER` and JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def answer(request: dict[str, Any]) -> list[list[int]]:
    """Tokens that follow, greedily, in fp32.

    Args:
        request: `model` and `lora`, folders; `prompts` (tokens); `max_tokens`.
    """
    base = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, request["lora"]).eval()
    found = []
    for prompt in request["prompts"]:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        after = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=request["max_tokens"]
        )
        found.append(after[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    print("ANSWER", json.dumps(answer(json.load(sys.stdin))), flush=True)
