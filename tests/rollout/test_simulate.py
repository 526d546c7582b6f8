from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout.errors import Exit, InputError
from rollout.simulate import main, read_lengths

KEYS = [
    "policy", "workload", "seed", "tokens_per_s", "vs_best_static", "vs_oracle", "recompute_share",
    "over_budget_share", "rows_mean", "rows_max", "lower_bound_s", "total_s",
]  # fmt: skip


def written(folder: Path, text: str) -> str:
    path = folder / "lengths.csv"
    path.write_text(text)
    return str(path)


def test_main_compares_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    policies = "static:8,static:32,memory,sla,paper,watermark:0.02,predictive,oracle"
    status = main(
        f"--lengths ln0.6 --policies {policies} --kv-tokens 8000 --step-ms 5,0.1,1e-4,0.02 --requests 60 --group 2 "
        f"--max-new 300 --seeds 2 --json {out}".split()
    )
    assert status == Exit.COMPLETE
    results = json.loads(out.read_text())
    assert [list(result) for result in results] == [KEYS] * 16
    assert [result["policy"] for result in results[:8]] == policies.split(",")
    assert {result["seed"] for result in results} == {0, 1}
    for result in results:
        assert result["total_s"] > 0.98 * result["lower_bound_s"]
        assert 0 < result["vs_best_static"] < 1.2
        assert result["over_budget_share"] is None
        assert 0 < result["rows_mean"] <= result["rows_max"]
    assert all(result["vs_oracle"] == 1 for result in results if result["policy"] == "oracle")
    assert results[0]["rows_max"] == 8
    printed = capsys.readouterr().out
    header, first, *_ = printed.splitlines()
    named = "policy tok/s / best static / oracle recompute over budget rows mean rows max"
    assert " ".join(header.split()) == named
    assert first.split()[0] == "static:8"
    assert "lower bound on time:" in printed


def test_hints_of_a_file_order_its_rows(tmp_path: Path):
    """One row is as long as the job, and comes last."""
    rows = ["100,20"] * 150 + ["100,400"]
    times = []
    for hinted in (False, True):
        text = "prompt,output,length_hint\n" + "".join(f"{row},{row[4:] if hinted else ''}\n" for row in rows)
        out = tmp_path / "out.json"
        given = ["--lengths", written(tmp_path, text), "--policies", "predictive", "--kv-tokens", "2000"]
        assert main([*given, "--json", str(out)]) == Exit.COMPLETE
        times.append(json.loads(out.read_text())[0]["total_s"])
    assert times[1] < 0.8 * times[0]


def test_steps_over_budget_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    given = ["--lengths", "unif", "--requests", "40", "--policies", "static:40,predictive", "--budget-ms", "8"]
    assert main([*given, "--step-ms", "5,0.2,0,0.02", "--json", str(out)]) == Exit.COMPLETE
    static, predictive = json.loads(out.read_text())
    assert static["over_budget_share"] > 0.3 > 0.02 > predictive["over_budget_share"]
    assert "with prefills of" in capsys.readouterr().out


def test_read_lengths_knows_azure_and_plain_headers(tmp_path: Path):
    azure = read_lengths(
        Path(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,374,44\nx,396,109\n")),
        None,
        None,
        1,
    )
    assert (azure.prompt_tokens.tolist(), azure.output_tokens.tolist()) == ([374, 396], [44, 109])
    assert azure.max_new_tokens.tolist() == [128, 128]
    assert azure.length_hints is None
    plain = read_lengths(Path(written(tmp_path, "output,prompt,length_hint\n5,9,4.5\n6,8,\n7,7,1\n")), 2, 5, 2)
    assert (plain.prompt_tokens.tolist(), plain.output_tokens.tolist()) == ([9, 9], [5, 5])
    assert plain.length_hints is not None
    assert np.isnan(plain.length_hints).tolist() == [False, True]


def test_read_lengths_knows_beginnings(tmp_path: Path):
    text = "prompt,output,Prefix,prefix_tokens\n90,5,a,64\n80,6,,\n70,7, a ,64\n99,7,b,99\n"
    prefixes = read_lengths(Path(written(tmp_path, text)), None, None, 1).prefixes
    assert prefixes is not None
    assert (prefixes.nodes.tolist(), prefixes.tokens.tolist()) == ([0, -1, 0, 1], [64, 99])
    none = read_lengths(Path(written(tmp_path, "prompt,output,prefix,prefix_tokens\n90,5,,\n")), None, None, 1)
    assert none.prefixes is None


def test_prompts_that_begin_alike_take_less_time(tmp_path: Path):
    times = []
    for name in ("a", ""):
        lines = [f"1000,20,{name},{960 if name else ''}"] * 20
        text = "\n".join(["prompt,output,prefix,prefix_tokens", *lines])
        out = tmp_path / "out.json"
        given = ["--lengths", written(tmp_path, text), "--policies", "predictive", "--kv-tokens", "4000"]
        assert main([*given, "--json", str(out)]) == Exit.COMPLETE
        times.append(json.loads(out.read_text())[0]["total_s"])
    assert times[0] < 0.5 * times[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,output,prefix\n1,2,a\n", "column 'prefix' alone, but needs both 'prefix' and 'prefix_tokens'"),
        ("prompt,output,prefix_tokens\n1,2,1\n", "column 'prefix_tokens' alone"),
        ("prompt,output,prefix,prefix_tokens\n10,2,a,x\n", "line 2: prefix_tokens is 'x'"),
        (
            "prompt,output,prefix,prefix_tokens\n10,2,a,11\n",
            "prefix_tokens is 11, but must be from 1 to the prompt's 10",
        ),
        ("prompt,output,prefix,prefix_tokens\n10,2,a,0\n", "prefix_tokens is 0, but must be from 1"),
        (
            "prompt,output,prefix,prefix_tokens\n10,2,a,5\n9,2,a,6\n",
            "line 3: prefix_tokens of prefix 'a' is 6, but 5 in",
        ),
        ("prompt,output,prefix,prefix_tokens\n10,2,,5\n", "line 2: prefix_tokens is '5', but prefix is empty"),
        ("a,b\n1,2\n", "no column 'contexttokens' or 'prompt_tokens', only a, b"),
        ("prompt,tokens\n1,2\n", "no column 'generatedtokens' or 'output_tokens'"),
        ("prompt,output\n", "has no rows"),
        ("", "only an empty line"),
        ("prompt,output\n1,2\n3,x\n", "line 3: output is 'x'"),
        ("prompt,output\n1\n", "line 2: output is None"),
        ("prompt,output\n-1,2\n", "line 2: prompt is '-1'"),
        ("prompt,output,length_hint\n1,2,long\n", "line 2: length_hint is 'long'"),
    ],
)
def test_malformed_file_raises_input_error(tmp_path: Path, text: str, said: str):
    with pytest.raises(InputError, match=said.replace("'", ".")):
        read_lengths(Path(written(tmp_path, text)), None, None, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--lengths", "conf"], "neither a file nor a workload; the nearest is 'conv'"),
        (["--lengths", "conv", "--policies", "predictve"], "no policy 'predictve'; the nearest is 'predictive'"),
        (["--lengths", "conv", "--policies", "static:many"], "write static:ROWS"),
        (["--lengths", "conv", "--policies", "static:0"], "write static:ROWS"),
        (["--lengths", "conv", "--policies", "static:inf"], "write static:ROWS"),
        (["--lengths", "conv", "--policies", "static:nan"], "write static:ROWS"),
        (["--lengths", "conv", "--policies", "watermark:2"], "write watermark:SHARE"),
        (["--lengths", "conv", "--step-ms", "1,2,3"], "'1,2,3' is not four numbers"),
        (["--lengths", "conv", "--step-ms", "0,0,0,0"], "cost nothing"),
        (["--lengths", "conv", "--step-ms", "nan,0,0,0"], "endless cost"),
        (["--lengths", "conv", "--step-ms", "inf,0,0,0"], "endless cost"),
        (["--lengths", "conv", "--budget-ms", "-3"], "not a number of milliseconds"),
        (["--lengths", "conv", "--budget-ms", "inf"], "not a number of milliseconds"),
        (["--lengths", "conv", "--kv-tokens", "none"], "not a whole number"),
        (["--lengths", "conv", "--kv-tokens", "64"], "does not fit into 64 tokens"),
        (["--lengths", "conv", "--request", "5"], "--request is no option: write --requests."),
        ([], "--lengths"),
    ],
)
def test_wrong_argument_prints_one_sentence(given: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(given) == Exit.BAD_INPUT
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_missing_output_folder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--lengths", "unif", "--requests", "8", "--policies", "static"]
    assert main([*given, "--json", str(tmp_path / "no" / "out.json")]) == Exit.BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err


def test_simulate_runs_as_a_module():
    command = [sys.executable, "-m", "rollout.simulate", "--lengths", "nothing"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
