"""How a stage loads, offloads, parallelises, caches: one technique is one module with a spec, an apply and a reset."""
