"""Step batching: concurrent requests meet in the denoiser's forward, and compatible calls become one."""
