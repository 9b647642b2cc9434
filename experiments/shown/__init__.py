"""Which tables and figures stand where. Each is shown in full: losing rows are not left out.

One module per family of experiments; a new one is added to both tuples.
"""

from experiments.methods import MethodTable
from experiments.shown import (
    deeponet,
    early_stopping,
    fit,
    foundation,
    lc_pfn,
    long_context,
    longspec,
    lossy,
    metric_grids,
    pipeline,
    self_speculation,
    seqpe,
    serving,
    sparse_prefill,
    speculative,
    speculative_bench,
    sweeps,
)

TABLES = (
    MethodTable("methods", "WORKSPACE.md"),
    *foundation.TABLES,
    *fit.TABLES,
    *speculative.TABLES,
    *deeponet.TABLES,
    *lc_pfn.TABLES,
    *long_context.TABLES,
    *longspec.TABLES,
    *lossy.TABLES,
    *early_stopping.TABLES,
    *metric_grids.TABLES,
    *pipeline.TABLES,
    *self_speculation.TABLES,
    *seqpe.TABLES,
    *serving.TABLES,
    *sparse_prefill.TABLES,
    *speculative_bench.TABLES,
    *sweeps.TABLES,
)
"""Every committed table."""

FIGURES = (
    *speculative.FIGURES,
    *deeponet.FIGURES,
    *lc_pfn.FIGURES,
    *long_context.FIGURES,
    *longspec.FIGURES,
    *lossy.FIGURES,
    *early_stopping.FIGURES,
    *metric_grids.FIGURES,
    *pipeline.FIGURES,
    *self_speculation.FIGURES,
    *serving.FIGURES,
    *sparse_prefill.FIGURES,
    *speculative_bench.FIGURES,
    *sweeps.FIGURES,
)
"""Every committed figure."""
