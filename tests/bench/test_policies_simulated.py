"""Tables of jobs/bench/policies_simulated.py, on jobs too small for meaningful figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jobs.bench import policies_simulated
from jobs.bench.lib import paper_figures, tables
from rollout.batcher.simulation.workloads import workload_of


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: replace(setting, requests=12) for name, setting in policies_simulated.SETTINGS.items()}
    monkeypatch.setattr(policies_simulated, "SETTINGS", settings)
    monkeypatch.setattr(
        paper_figures,
        "_TABLE_1",
        tuple((m, p, o, 20, s, d) for m, p, o, _, s, d in paper_figures._TABLE_1[:1]),
    )


@pytest.mark.parametrize(
    ("figure", "heads"),
    [
        ("memory", ["workload", "predictive", "memory"]),
        ("budget", ["workload", "best static", "paused"]),
        ("hints", ["workload", "error 0.6", "former epoch"]),
        ("useless", ["workload", "machine", "standard error"]),
        ("victims", ["workload", "cheapest / youngest"]),
    ],
)
def test_figure_prints_table_with_workloads(figure: str, heads: list[str], capsys: pytest.CaptureFixture[str]):
    policies_simulated.main([figure, "--machines", "S", "--workloads", "const,unif", "--seeds", "1"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert set(heads) <= {cell.strip() for cell in table[0].split("|")}
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert {line.split("|")[1].strip() for line in table} >= {"const", "unif"}


def test_forecast_prints_row_per_machine_and_workload(capsys: pytest.CaptureFixture[str]):
    policies_simulated.main(["forecast", "--machines", "S,B", "--workloads", "const,unif", "--seeds", "2"])
    table = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[2:] == ["S const", "S unif", "B const", "B unif"]


def test_budget_is_that_of_half_the_memory_bound_batch():
    machine = policies_simulated.SETTINGS["B"].machine
    job = workload_of("constant", np.full(9, 100), np.full(9, 100))
    # 100,000 / (100 + 50) rows in memory; half of them, and half of the tokens.
    assert policies_simulated.memory_bound_rows(job, machine) == pytest.approx(666.67, abs=0.01)
    assert policies_simulated.budget_ms(job, machine) == pytest.approx(1.3 * (5.5 + 0.02 * 333.33 + 2.2), abs=0.01)


def test_geomean_is_geometric_mean():
    assert tables.geomean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
