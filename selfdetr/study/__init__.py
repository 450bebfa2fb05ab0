"""Runs and tables: specs, what computes a run, a cache of runs, many runs side by side, statistics, tables.

The names below are imported when they are first used, so that one can read a spec without importing a trainer.
"""

__all__ = ["RunSpec", "make_spec", "open_dataset", "override", "check_parameters", "source_hash", "Run", "run", "runs",
           "read_run", "run_all", "interval", "verdict", "Table", "table", "read_table", "write_claims"]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in ("spec", "compute", "cache", "pool", "statistics", "tables"):
        raise AttributeError(name)  # not imported yet
    import selfdetr.study.cache as cache
    import selfdetr.study.compute as compute
    import selfdetr.study.pool as pool
    import selfdetr.study.spec as spec
    import selfdetr.study.statistics as statistics
    import selfdetr.study.tables as tables

    for module in (spec, compute, cache, pool, statistics, tables):
        if name in vars(module):
            return vars(module)[name]
    raise AttributeError(f"module 'selfdetr.study' has no attribute {name!r}")
