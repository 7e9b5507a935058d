"""Tokens a second of generation beside transformers' `generate`, in one process, on the same random weights, in turns.

python -m benchmarks.generate                 a Llama-like model of 43 M parameters, fp32, on this machine's CPU
python -m benchmarks.generate --bf16 --rounds 5

Both read the prompts in one pass and take the likeliest token; what they make must be the same (in fp32). Printed are
medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, LAYERS = 8192, 512, 12


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--made", type=int, default=64, help="tokens made after each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()

    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        theirs = _theirs(Path(folder) / "theirs", torch.bfloat16 if asked.bf16 else torch.float32)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ours = _ours(Path(folder))
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {'bf16' if asked.bf16 else 'fp32'}")
        print(f"{'':10}{'tplaunch':>12}{'transformers':>14}{'ratio':>8}   tokens a second")
        for batch in (1, 8):
            prompts = torch.randint(1, VOCAB, (batch, asked.prompt), generator=torch.Generator().manual_seed(batch))
            rounds = []
            for number in range(asked.rounds + 1):
                mine, made = _run_ours(ours, prompts.tolist(), asked.made)
                other, same = _run_theirs(theirs, prompts, asked.made)
                if not asked.bf16 and made != same:
                    raise SystemExit("the two made other tokens")
                if number:  # the first warms both
                    rounds.append((*mine, *other))
            reading, making, their_reading, their_making = (
                statistics.median(each) for each in zip(*rounds, strict=True)
            )
            for name, rate, other_rate in (("prompts", reading, their_reading), ("made", making, their_making)):
                print(f"{f'{name} x{batch}':10}{rate:12.1f}{other_rate:14.1f}{rate / other_rate:8.2f}")
        dist.destroy_process_group()


def _theirs(folder: Path, dtype: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def _ours(folder: Path) -> Any:
    import torch

    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.generate.load import load_model
    from tplaunch.generate.run import check
    from tplaunch.huggingface.folder import import_folder
    from tplaunch.parallel.mesh import Mesh

    import_folder(folder / "theirs", folder / "ours")
    origin = origin_of(folder / "ours")
    recipe = check(origin, 1, 1).recipe
    return load_model(recipe, Mesh.of(recipe, torch.device("cpu")), origin.checkpoint)


def _run_ours(model: Any, prompts: list[list[int]], count: int) -> tuple[tuple[float, float], list[list[int]]]:
    """Tokens a second read and made, and the tokens."""
    from tplaunch.generate.decode import Speed, generate
    from tplaunch.generate.sample import Sampling

    speed, made = Speed(), [[] for _ in prompts]  # type: ignore[var-annotated]
    for one in generate(
        model,
        prompts,
        max_tokens=count,
        sampling=Sampling(temperature=0),
        seeds=[0] * len(prompts),
        ends=(),
        batch_size=len(prompts),
        speed=speed,
    ):
        made[one.prompt].append(one.token)
    return (speed.read / speed.reading, speed.made / speed.making), made


def _run_theirs(model: Any, prompts: Any, count: int) -> tuple[tuple[float, float], list[list[int]]]:
    """The same; the time of making is that of all less that of the first token alone."""
    import torch

    def timed(tokens: int) -> tuple[float, Any]:
        began = time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return time.perf_counter() - began, found

    first, _ = timed(1)
    whole, found = timed(count)
    rates = prompts.numel() / first, len(prompts) * (count - 1) / (whole - first)
    return rates, found[:, prompts.shape[1] :].tolist()


if __name__ == "__main__":
    main()
