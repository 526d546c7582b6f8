"""What a job imports, and when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

#: Runs a job up to the first import of the last of some slow packages. Prints for each that was imported which were
#: imported before, and whether Python's garbage collector may run meanwhile.
_WATCHED = """
import gc, json, os, sys

SLOW = ("datasets", "pandas", "torch", "transformers", "transformers.modeling_utils")
seen = {}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in SLOW and name not in seen:
            seen[name] = ([other for other in SLOW if other in sys.modules], gc.isenabled())
        if name == SLOW[-1]:
            end()

def end():
    print(json.dumps(seen), flush=True)
    os._exit(0)

sys.meta_path.insert(0, Watch())
from rollout.__main__ import main
main(sys.argv[1:])
end()
"""


def imported(*arguments: str) -> dict[str, tuple[list[str], bool]]:
    command = [sys.executable, "-c", _WATCHED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return {name: (before, enabled) for name, (before, enabled) in json.loads(done.stdout.splitlines()[-1]).items()}


def test_wrong_arguments_are_refused_without_slow_imports(tmp_path: Path) -> None:
    assert imported(f"output.dir={tmp_path / 'out'}", "sampling.temperature=-1") == {}


def test_slow_imports_come_late_and_no_garbage_is_looked_for_meanwhile(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"")
    seen = imported(f"model.path={model}", "model.device=cpu", "data.limit=2", f"output.dir={tmp_path / 'out'}")
    assert not {"torch", "transformers"} & {*seen["datasets"][0], *seen["pandas"][0]}
    assert [enabled for _, enabled in seen.values()] == [False] * 5
