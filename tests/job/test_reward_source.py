"""What a reward is made of: its modules by their source, packages by their version, whatever form it has."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.reward_source import _distributions, source_of
from tests.support.jobs import FakeEngine, config_of, load_fake, refuse_to_load


class Project:
    """Modules in a folder of their own, which stand for a user's project; ``origins_`` begins their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str = "") -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def source(self, target: str) -> dict[str, str]:
        """Return what a fresh process would find."""
        for name in [name for name in sys.modules if name.startswith("origins_")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return source_of({"_target_": target})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Project(tmp_path)
    for name in [name for name in sys.modules if name.startswith("origins_")]:
        del sys.modules[name]


_FORMS = """
import functools
def function(row, text): return 1.0
class Class:
    def __call__(self, row, text): return 1.0
    def method(self, row, text): return 1.0
obj = Class()
method = obj.method
partial = functools.partial(function, x=1)
anonymous = lambda row, text: 1.0
"""


@pytest.mark.parametrize("form", ["function", "Class", "obj", "method", "partial", "anonymous", "Class.method"])
def test_every_form_has_the_source_of_its_module(project: Project, form: str) -> None:
    project.write("origins_forms.py", _FORMS)
    before = project.source(f"origins_forms.{form}")
    assert list(before) == ["source.origins_forms"]
    project.write("origins_forms.py", _FORMS.replace("1.0", "2.0"))
    assert project.source(f"origins_forms.{form}") != before


def test_both_the_module_that_names_it_and_the_one_that_defines_it_count(project: Project) -> None:
    project.write("origins_names.py", "import importlib\nscore = importlib.import_module('origins_' + 'defines').f\n")
    project.write("origins_defines.py", "def f(row, text): return 1.0\n")
    assert list(project.source("origins_names.score")) == ["source.origins_defines", "source.origins_names"]


def test_a_decorated_function_has_the_source_of_both(project: Project) -> None:
    project.write(
        "origins_wrap.py",
        "import functools\ndef deco(f):\n    @functools.wraps(f)\n    def g(*a): return f(*a)\n    return g\n",
    )
    project.write("origins_used.py", "from origins_wrap import deco\n@deco\ndef f(row, text): return 1.0\n")
    assert list(project.source("origins_used.f")) == ["source.origins_used", "source.origins_wrap"]


def test_imports_of_the_project_are_followed(project: Project) -> None:
    """Absolute and relative, at the top and inside functions, in turn and in circles; what is not imported is not."""
    project.write("origins_pkg/__init__.py", "from . import unused_by_the_reward\n")
    project.write("origins_pkg/unused_by_the_reward.py")
    project.write(
        "origins_pkg/sub/rewards.py",
        "from .near import a\nfrom ..far import b\ndef f(row, text):\n    import origins_top.deep\n    return 1.0\n",
    )
    project.write("origins_pkg/sub/__init__.py")
    project.write("origins_pkg/sub/near.py", "a = 1\nfrom origins_pkg.sub import rewards\n")
    project.write("origins_pkg/far.py", "b = 1\nimport json\n")
    project.write("origins_top/__init__.py")
    project.write("origins_top/deep.py", "import no_such_module\n")
    names = ["far", "sub", "sub.near", "sub.rewards"]
    expected = [*(f"source.origins_pkg.{name}" for name in names), "source.origins_top", "source.origins_top.deep"]
    found = project.source("origins_pkg.sub.rewards.f")
    assert list(found) == expected
    assert "origins_top.deep" not in sys.modules  # found, and not run
    project.write("origins_top/deep.py", "import no_such_module  # changed\n")
    changed = project.source("origins_pkg.sub.rewards.f")
    assert {name for name in found if found[name] != changed[name]} == {"source.origins_top.deep"}


def test_installed_packages_count_by_their_version(project: Project) -> None:
    project.write("origins_np.py", "import numpy.linalg, yaml\nimport os.path\ndef f(row, text): return 1.0\n")
    found = project.source("origins_np.f")
    assert list(found) == ["package.PyYAML", "package.numpy", "source.origins_np"]
    assert found["package.numpy"] == metadata.version("numpy")
    assert "package.numpy" in source_of({"_target_": "numpy.linalg.norm"})


def test_packages_may_be_installed_in_any_folder(project: Project) -> None:
    folder = project.folder / "libs"
    project.write("libs/origins_lib/__init__.py", "")
    project.write("libs/origins_lib/inner.py", "import json\n")
    project.write("libs/origins_lib-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: origins-lib\nVersion: 1.5\n")
    project.write("libs/origins_lib-1.5.dist-info/top_level.txt", "origins_lib\n")
    project.write("origins_libs.py", "import origins_lib.inner\ndef f(row, text): return 1.0\n")
    sys.path.insert(0, str(folder))
    _distributions.cache_clear()
    try:
        found = project.source("origins_libs.f")
    finally:
        sys.path.remove(str(folder))
        _distributions.cache_clear()
    assert list(found) == ["package.origins-lib", "source.origins_libs"]
    assert found["package.origins-lib"] == "1.5"


def test_this_package_counts_by_the_module_that_defines_the_reward() -> None:
    assert list(source_of({"_target_": "rollout.arithmetic.exact_match"})) == ["source.rollout.arithmetic"]


def test_this_package_is_not_followed(project: Project) -> None:
    project.write("origins_own.py", "from rollout.arithmetic import exact_match\nfrom rollout import Engine\n")
    project.write("origins_own.py", (project.folder / "origins_own.py").read_text() + "def f(r, t): return 1.0\n")
    assert list(project.source("origins_own.f")) == ["source.origins_own"]


def test_functions_of_the_standard_library_count_by_pythons_version() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert source_of({"_target_": "math.fsum"}) == {"package.python": version}


def test_targets_inside_the_arguments_count(project: Project) -> None:
    project.write("origins_outer.py", "def f(row, text, judges): return 1.0\n")
    project.write("origins_judge.py", "class Judge: pass\n")
    reward = {"_target_": "origins_outer.f", "judges": [{"of": {"_target_": "origins_judge.Judge"}}], "n": 3}
    assert list(source_of(reward)) == ["source.origins_judge", "source.origins_outer"]


def test_a_reward_without_a_file_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = type(sys)("origins_made")
    exec("def f(row, text): return 1.0", made.__dict__)
    monkeypatch.setitem(sys.modules, "origins_made", made)
    with caplog.at_level(logging.WARNING):
        assert source_of({"_target_": "origins_made.f"}) == {}
    assert caplog.messages[0].startswith("The source of reward._target_=origins_made.f is in no file")


def test_a_run_is_not_resumed_with_a_changed_reward(project: Project, tmp_path: Path) -> None:
    """The message names the module; the version that the run began with may go on."""
    text = "import origins_near\ndef f(row, text): return 1.0\n"
    project.write("origins_reward.py", text)
    project.write("origins_near.py", "x = 1\n")
    config = config_of(tmp_path, "data.limit=4", "reward._target_=origins_reward.f")
    with pytest.raises(RuntimeError):
        run_job(config, load_fake(FakeEngine(fail_after=2)))
    for module, changed in (("origins_reward", text + "# comment\n"), ("origins_near", "x = 2\n")):
        path = project.folder / f"{module}.py"
        before = path.read_text()
        path.write_text(changed)
        with pytest.raises(InputError, match=rf"another fingerprint \(reward\.source\.{module} was [^;]*\): choose"):
            run_job(config, refuse_to_load)
        path.write_text(before)
    assert run_job(config, load_fake()) == Exit.COMPLETE
