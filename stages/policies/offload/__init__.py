"""Offload policies: where weights live while a stage runs on a device that cannot hold them all.

`apply_offload` (in `apply`) takes plain CPU modules and a plan, and returns an `Offload`:

- `component`: whole components take turns in one stretch of device memory; leaving is forgetting.
- `layerwise`: blocks stream through a few slots, ahead of the calls that need them; all else stays on the device.
- `disk`: layerwise, from files that are mapped instead of host memory.
- `none`: nothing is done.

Rules that hold for all: the host tensors are the masters and are never written; no weight is copied back from the
device; buffers and tensors that are more than their bytes stay on the device.

What changes a module later plugs in here:

- Layers that are injected around existing ones (adapters such as LoRA): a unit holds `Parameter` objects, not names, so
  wrapped layers keep working as they are. New parameters stay where they were made; make them on the device.
  `Offload.refresh()` finds all units anew and takes new parameters on the CPU into them.
- Weights that are written (an adapter fused into them): reset, write, apply again. Writes to the device are lost.
- Quantized weights (tensor subclasses that hold scales of their own): they stay on the device.
"""
