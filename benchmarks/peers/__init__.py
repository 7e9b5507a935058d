"""tplaunch beside other trainers on the same work, on this machine's CPU.

python -m benchmarks.peers setup DIR                    # a virtual environment for the others
python -m benchmarks.peers run --venv DIR --output results.jsonl [--rounds N] [--shape small|134m] ...
python -m benchmarks.peers table results.jsonl > docs/performance.md
"""
