"""One module per engine; each runs in a process of its own, so that none inherits memory or settings.

Peers run in environments that have neither this project nor, perhaps, torch: what all share (`harness`, and
`jobs.bench.lib.workload`) needs the standard library alone.
"""
