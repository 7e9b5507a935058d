"""Text from vLLM: a JSON request on stdin, `ANSWER` and JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def answer(request: dict[str, Any]) -> list[list[int]]:
    """Tokens that follow, greedily, in fp32.

    Args:
        request: `model`, a folder; `prompts` (tokens) or `chats` (messages); `max_tokens`; where they are not 1 and
            none, `tp` and `lora`, the folder of an adapter.
    """
    tp, adapter = request.get("tp", 1), request.get("lora")
    cores = "|".join(str(core) for core in range(tp))  # one for each rank
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND=cores)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        request["model"],
        tensor_parallel_size=tp,
        dtype="float32",
        enforce_eager=True,
        enable_lora=adapter is not None,
        max_lora_rank=16,
    )
    how = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"])
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
    if "chats" in request:
        outputs = llm.chat(request["chats"], how, lora_request=lora)
    else:
        prompts: Any = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
        outputs = llm.generate(prompts, how, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    print("ANSWER", json.dumps(answer(json.load(sys.stdin))), flush=True)
