"""Write a workload file.

python -m jobs.bench.make_workload MODEL OUT.json --requests 128 --samples 8 --prompts FILE.jsonl --column question
python -m jobs.bench.make_workload MODEL OUT.json --named w5
"""

from __future__ import annotations

from jobs.bench.lib.workload import main

if __name__ == "__main__":
    main()
