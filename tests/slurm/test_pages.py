"""The commands of the pages that submit a script are taken by a SLURM as they stand."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.slurm.conftest import ROOT, Submissions

pytestmark = pytest.mark.long

PAGES = ("README.md", "docs/slurm.md")
LINES = [
    (page, line)
    for page in PAGES
    for block in re.findall(r"^```sh-slurm\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("sbatch ")
]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_commands(page: str) -> None:
    assert page in dict(LINES)


def test_commands_of_pages_start_their_jobs(submissions: Submissions) -> None:
    cluster, calls = submissions.cluster, submissions.folder / "calls"
    submissions.python(f'echo "$@" >> "{calls}"')
    (submissions.folder / "jobs").symlink_to(ROOT / "jobs")
    path = f"{submissions.folder / 'bin'}:{cluster.environment['PATH']}"
    jobs, wanted = [], set()
    for _, line in LINES:
        words = shlex.split(line)[1:]
        script = next(index for index, word in enumerate(words) if word.endswith(".sbatch"))
        wanted.add(" ".join(["-m rollout", *words[script + 1 :]]))
        # Two tasks of an array show as much as all of them.
        fewer = ["--array=0-1"] if "--array" in line else []
        jobs.append(cluster.submit(*words[:script], *fewer, *words[script:], cwd=submissions.folder, PATH=path))
    for job in jobs:
        cluster.finish(job)
    assert set(calls.read_text().splitlines()) == wanted
