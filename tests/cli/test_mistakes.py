"""Every mistake on a command line ends in one sentence that says what to write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ask

Sentence = Callable[[str | list[str]], str]

MISTAKES = [
    # names and values of other tools, and of Hydra
    ("model.name=gpt2", "write model.path=gpt2."),
    ("output.path=out", "write output.dir=out."),
    ("data.column=text", "write data.prompt_column=text."),
    ("reward.fn=mine.score", "write reward._target_=mine.score."),
    ("reward=my_reward.py", "write reward._target_=my_reward.FUNCTION."),
    ("reward._target_=rewards/mine.py:score", "write reward._target_=rewards.mine.score."),
    ("hydra.job.num=x", "hydra.job.num is x, but must be a whole number: --cfg hydra prints"),
    ("hydra.mode=FAST", "hydra.mode is FAST, but must be one of RUN, MULTIRUN"),
    ("hydra.job.chdir=maybe", "must be true or false"),
    ("hydra.output_subdir=[1]", "must be text"),
    ("hydra.verbose={}", "write hydra.verbose=true"),
    ("tracker=mlflow,wandb", "tracker takes one value, but mlflow,wandb has several: write one, as in tracker=mlflow"),
    ("data.path=a.jsonl,b.jsonl", "write a glob, as in 'data.path=folder/*.jsonl'"),
    ("data.chat_template_kwargs=thinking=false", "write 'data.chat_template_kwargs={thinking: false}'."),
    ("'data.system_prompt=a\nb'", "write $'data.system_prompt=\"a\\nb\"'."),
    ("sampling n=3", "write sampling.n=3, without a space."),
    ("sampling.n=3 extra", "extra is no override: write KEY=VALUE"),
    ("output.dir=o 'more words'", "'more words' is no override"),
    # options
    ("--foo", "--foo is no option: --help lists the options"),
    ("--experiment ppo_sampling", "write +experiment=ppo_sampling."),
    ("--experiment=ppo_sampling", "write +experiment=ppo_sampling."),
    ("--output-dir x", "--output-dir is no option: write output.dir=x."),
    ("--output.dir=x", "write output.dir=x."),
    ("--max_tokens 5", "write sampling.max_new_tokens=5."),
    ("-n 3", "write sampling.n=3."),
    ("--model Qwen/Qwen2.5-0.5B", "write model.path=Qwen/Qwen2.5-0.5B."),
    ("--stop '###'", "write 'sampling.stop=[\"###\"]'."),
    ("--as_chat", "write data.as_chat=true."),
    ("--multi-run", "write --multirun."),
    ("-help", "write --help"),
    ("help", "write --help"),
    ("—cfg job", "write --cfg."),
    ("–m seed=1,2", "write -m."),
    ("--cfg", "--cfg has no value: write --cfg job."),
    ("--cfg jbo", "must be one of job, hydra, all: write --cfg job."),
    ("--cfg job --cfg all", "--cfg is given 2 times"),
    ("-m --cfg job", "exclude each other"),
    ("--resolve", "write --cfg job --resolve."),
    ("-p sampling", "write --cfg job --package sampling."),
    ("--cfg job -p smapling", "--package is one of model, data, sampling"),
    ("-cd no/folder", "--config-dir no/folder is not a folder"),
    ("-cn nothing", "There is no configuration nothing"),
    ("-cp x", "--config-path is not offered"),
    ("--experimental-rerun x", "--experimental-rerun is not offered"),
    ("--info everything", "must be one of all, config"),
    ("-sc install=tcsh", "There is no completion for tcsh: write one of bash, fish, zsh."),
    # words without an equals sign
    ("sampling.n = 3", "write sampling.n=3, without a space."),
    ("sampling.n =3", "write sampling.n=3, without a space."),
    ("sampling.n= 3", "write sampling.n=3, without a space."),
    ("sampling.n 3", "write sampling.n=3, without a space."),
    ("sampling.n:3", "write sampling.n=3."),
    ("sampling.n==3", "sampling.n==3 has two equals signs: write sampling.n=3."),
    ("'sampling.n =3'", "write sampling.n=3."),
    ("sampling.n＝3", "write sampling.n=3."),
    ("model:path=x", "write model.path=x."),
    ("data.as_chat", "write data.as_chat=true."),
    ("+experiment:ppo_sampling", "write +experiment=ppo_sampling."),
    ("+experiments=ppo_sampling", "write +experiment=ppo_sampling."),
    ("+experiment=ppo_sampling,grpo_sampling", "or add -m for a job with each."),
    ("+++sampling.n=2", "write sampling.n=2."),
    ("--multirun=true", "--multirun takes no value"),
    ("ppo_sampling", "write +experiment=ppo_sampling."),
    ("prompts.jsonl", "write data.path=prompts.jsonl."),
    ("data.path=my prompts.jsonl", "write 'data.path=my prompts.jsonl'."),
    ("data.path=a.jsonl b.jsonl", "b.jsonl is one path too many"),
    ("=3", "=3 names no key"),
    ("''", "One argument is empty"),
    (["\u200bsampling.n=3"], "the character '\\u200b' in its key"),
    ("data.system_prompt=You are helpful", "write 'data.system_prompt=You are helpful'."),
    ("data.system_prompt=Say x=1 please", "write 'data.system_prompt=\"Say x=1 please\"'."),
    ("sampling.stop=[a, b]", "write 'sampling.stop=[a, b]'."),
    ("sampling.logit_bias={15: -1.5}", "write 'sampling.logit_bias={15: -1.5}'."),
    ("sampling.top_k= -1", "write sampling.top_k=-1, without a space."),
    ("'sampling.logit_bias={\"15\": -1}'", "write 'sampling.logit_bias={15: -1}'."),
    # keys
    ("sampling.temprature=1", "the nearest is sampling.temperature."),
    ("Sampling.N=1", "the nearest is sampling.n."),
    ("sampling_n=1", "the nearest is sampling.n."),
    ("sampling/n=1", "the nearest is sampling.n."),
    ("quantum=1", "lists all keys."),
    ("sampling.quantum=1", "the keys of sampling are n, temperature"),
    ("max_tokens=5", "here it is sampling.max_new_tokens: write sampling.max_new_tokens=5."),
    ("gpu_memory_utilization=0.9", "memory.reserve_fraction is the share of the memory that stays free."),
    ("sampling.num_beams=2", "beam search is not offered."),
    ("batch_size=8", "batcher.max_rows caps it."),
    ("do_sample=true", "sampling.temperature=0 is greedy"),
    ("model.load_in_8bit=true", "is not offered."),
    ("dataset=x.jsonl", "write data.path=x.jsonl."),
    ("batcher.alpha=3", "add batcher=sla or batcher=paper"),
    ("+experiment=ppo_sampling +experiment=grpo_sampling", "experiment is given twice"),
    ("+sampling.n=2", "write sampling.n=2."),
    ("~sampling.stop", "leave it out, and it is []."),
    ("~sampling", "would remove what every job needs"),
    ("~foo", "There is no key foo"),
    ("hydra.foo=1", "There is no key hydra.foo"),
    ("hydra/launcher=foo", "hydra/launcher is one of basic"),
    ("hydra/sweeper=optuna", "leave it out"),
    ("sampling@x=greedy", "write sampling=greedy."),
    ("reward.scale=2", "write +reward.scale=2."),
    ("batcher.name=sla", "write batcher=sla."),
    ("+reward.scale=2", "reward.scale needs a function: write reward._target_=MODULE.FUNCTION"),
    ("reward._target_=", "reward._target_ needs a function"),
    ("hydra.mode=FOO", "must be one of RUN, MULTIRUN"),
    ("reward.target=a.b", "here it is reward._target_"),
    # options of groups
    ("experiment=ppo_sampling", "write +experiment=ppo_sampling."),
    ("+experiment=ppo_samplng", "did you mean ppo_sampling"),
    ("batcher=statik", "did you mean static"),
    ("batcher=_bounds", "batcher is one of memory, paper, predictive, sla, static."),
    ("batcher=schema_sla", "batcher is one of memory, paper, predictive, sla, static."),
    ("batcher=static,sla", "add -m"),
    ("model=Qwen/Qwen2.5-0.5B", "write model.path=Qwen/Qwen2.5-0.5B ("),
    ("data=prompts.jsonl", "write data.path=prompts.jsonl ("),
    ("reward=my.score", "write reward._target_=my.score ("),
    ("sampling={n:2}", "set each with sampling.KEY=VALUE."),
    ("+sampling=greedy", "write sampling=greedy."),
    # values
    ("sampling.n=abc", "sampling.n is abc, but must be a whole number (samples of each prompt)."),
    ("sampling.n=null", "sampling.n is null, but must be a whole number: write sampling.n=1"),
    ("sampling.n=", "sampling.n is empty"),
    ("sampling.n=[1]", "sampling.n is '[1]', but must be a whole number"),
    ("sampling.n={a:1}", "but must be a whole number"),
    ("sampling.n=true", "but must be a whole number"),
    ("sampling.n=1,000", "write sampling.n=1000"),
    ("data.limit=1e3", "write data.limit=1000."),
    ("data.limit=10k", "data.limit is 10k, but must be a whole number or null (read only this many rows"),
    ("data.limit=None", "write data.limit=null."),
    ("sampling.temperature=0,7", "write sampling.temperature=0.7"),
    ("sampling.temperature=hot", "must be a number (0 is greedy)."),
    ("memory.reserve_fraction=5%", "memory.reserve_fraction is 5%, but must be a number"),
    ("data.as_chat=maybe", "must be true or false"),
    ("data.as_chat=2", "must be true or false"),
    ("sampling.stop=null", "write sampling.stop=[]"),
    ("sampling.stop=a,b", "write 'sampling.stop=[a,b]'"),
    ("sampling.stop_token_ids=[a]", "must be a list of whole numbers"),
    ("model.adapter=None", "write model.adapter=null for no value"),
    ("model.dtype=bf16", "; the nearest is bfloat16."),
    ("model.dtype=torch.float16", "; the nearest is float16."),
    ("output.format=jsnol", "; the nearest is jsonl."),
    ("sampling.top_p=2", "sampling.top_p is 2.0, but must be above 0 and at most 1"),
    ("'output.dir=${oc.env:ROLLOUT_UNSET}'", "the environment variable ROLLOUT_UNSET, which is not set"),
    ("'output.dir=${nothing}'", "there is no key nothing"),
    ("'output.dir=${foo:bar}'", "there is no resolver foo"),
    ("'output.dir=${oc.env:HOME'", "write 'output.dir=${oc.env:HOME}'."),
]


@pytest.mark.parametrize(("line", "said"), MISTAKES, ids=[str(line) for line, _ in MISTAKES])
def test_mistake_is_refused_in_one_sentence(sentence: Sentence, line: str | list[str], said: str) -> None:
    given = [line] if isinstance(line, str) else line
    # A folder for those jobs whose mistake is seen only once all keys have a value.
    whole = line if isinstance(line, list) or "output.dir" in line or "-sc" in line else f"output.dir=out {line}"
    assert said in sentence(whole), given


@pytest.mark.parametrize("option", ["--cfg job", "-cd folder", "-cd folder -cn mine", "-m", "--info config"])
@pytest.mark.parametrize("mistake", ["sampling.temprature=1", "sampling.n=0", "x"])
def test_mistake_beside_an_option_is_refused(sentence: Sentence, tmp_path: Path, option: str, mistake: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.yaml").write_text("defaults:\n  - config\n  - _self_\n")
    said = sentence(f"{option} output.dir=out {mistake}")
    assert mistake.partition("=")[0] in said


FILES = {
    "key": (
        "# @package _global_\nsampling:\n  temprature: 1\n",
        "In experiment/key: There is no key sampling.temprature",
    ),
    "type": (
        "# @package _global_\nsampling:\n  n: abc\n",
        "In experiment/type: sampling.n is abc, but must be",
    ),
    "nothing": (
        "# @package _global_\nsampling:\n  n: null\n",
        "In experiment/nothing: sampling.n is None, but",
    ),
    "list": ("# @package _global_\nsampling:\n  stop: abc\n", "In experiment/list: sampling.stop must be a list of"),
    "node": ("# @package _global_\nsampling: 3\n", "In experiment/node: A group of keys has the value 3"),
    "yaml": ("# @package _global_\nsampling:\n  n: [1\n", "line 4 is not YAML"),
    "tab": ("# @package _global_\nsampling:\n\tn: 1\n", "line 3 is not YAML"),
    "option": ("# @package _global_\ndefaults:\n  - override /batcher: statik\n", "There is no batcher=statik"),
    "group": ("# @package _global_\ndefaults:\n  - override /batchr: sla\n", "There is no group batchr to override"),
    "package": ("sampling:\n  n: 2\n", "begin it with the line `# @package _global_`."),
    "range": ("# @package _global_\nsampling:\n  n: 0\n", "sampling.n is 0, but must be"),
    "variable": (
        "# @package _global_\nmodel:\n  path: ${oc.env:ROLLOUT_UNSET}\n",
        "environment variable ROLLOUT_UNSET",
    ),
    "others": ("# @package _global_\nmax_tokens: 3\n", "here it is sampling.max_new_tokens"),
}


@pytest.mark.parametrize("name", FILES)
def test_mistake_in_a_file_of_ones_own_is_refused(sentence: Sentence, tmp_path: Path, name: str) -> None:
    text, said = FILES[name]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    assert said in sentence(f"-cd . +experiment={name} output.dir=out")


def test_configuration_without_the_keys_of_a_job_is_refused(sentence: Sentence, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("sampling:\n  n: 3\n")
    assert "begin its defaults list with `- config`" in sentence("-cd . -cn bare")


HABITS = [
    ("~reward", "reward", None),
    ("reward=null", "reward", None),
    ("++seed=3", "seed", 3),
    ("seed=1 seed=2", "seed", 2),
    ("data.limit=1_000", "data.limit", 1000),
    ("data.as_chat=True", "data.as_chat", True),
    ("data.as_chat=yes", "data.as_chat", True),
    ("data.as_chat=off", "data.as_chat", False),
    ("sampling.stop=abc", "sampling.stop", ["abc"]),
    ("sampling.stop_token_ids=2", "sampling.stop_token_ids", [2]),
    ("sampling.stop=1e5", "sampling.stop", ["1e5"]),
    ("model.revision=1e5", "model.revision", "1e5"),
    ("model.revision=0123", "model.revision", "0123"),
    ("model.revision=1_0", "model.revision", "1_0"),
    ("data.split=true", "data.split", "true"),
    ("data.path=~/a.jsonl", "data.path", os.path.expanduser("~/a.jsonl")),
    ("'data.system_prompt= Hi '", "data.system_prompt", " Hi "),
    ("'data.system_prompt=Pay $5'", "data.system_prompt", "Pay $5"),
    ("'data.split=${seed}'", "data.split", "0"),
    ("'data.chat_template_kwargs={enable_thinking: false}'", "data.chat_template_kwargs", {"enable_thinking": False}),
    ("data.chat_template_kwargs.level=3", "data.chat_template_kwargs", {"level": 3}),
    ("+data.chat_template_kwargs.level=3", "data.chat_template_kwargs", {"level": 3}),
    ("data.sampling_columns.max_new_tokens=limit", "data.sampling_columns", {"max_new_tokens": "limit"}),
    ("'sampling.logit_bias={15: -1.5}'", "sampling.logit_bias", {15: -1.5}),
]


@pytest.mark.parametrize(("override", "key", "value"), HABITS)
def test_habit_is_honoured(ask: Ask, override: str, key: str, value: object) -> None:
    said = ask(f"output.dir=out {override}")
    assert said.status == 0, said.err
    found: object = said.configs[0]
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_key_given_twice_takes_the_last_and_is_warned_of(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    said = ask("output.dir=out sampling.n=1 sampling.n=2")
    assert said.configs[0].sampling.n == 2
    assert "sampling.n is given twice: sampling.n=2 is used." in caplog.text
