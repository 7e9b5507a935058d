"""Generation beside transformers' `generate`, on the same random weights, on this machine's CPU.

python -m benchmarks.generate run --output results.jsonl [--rounds N] [--shape small|134m] [--dtype fp32|bf16] ...
python -m benchmarks.generate table results.jsonl > docs/generation.md
"""
